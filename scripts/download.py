"""Fetch smollm2-135m, or org/name from the Hugging Face Hub, into checkpoints/NAME; or an adapter."""

from lit_adapter.cli.command import run
from lit_adapter.cli.download import main

if __name__ == "__main__":
    run(main)
