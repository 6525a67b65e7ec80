"""Write an adapter for transformers, vLLM, llama.cpp or Ollama."""

from lit_adapter.cli.command import run
from lit_adapter.cli.export import main

if __name__ == "__main__":
    run(main)
