"""Fetch smollm2-135m, or org/name from the Hugging Face Hub, into checkpoints/NAME; or an adapter."""

from lit_adapter.command import run
from lit_adapter.weights.cli import download_main

if __name__ == "__main__":
    run(download_main)
