"""Turn a Hugging Face folder, a Meta folder or a GGUF file into checkpoints/NAME."""

from lit_adapter.command import run
from lit_adapter.weights.cli import convert_main

if __name__ == "__main__":
    run(convert_main)
