"""Turn a Hugging Face folder, a Meta folder or a GGUF file into checkpoints/NAME."""

from lit_adapter.cli.command import run
from lit_adapter.cli.convert import main

if __name__ == "__main__":
    run(main)
