"""Serve a base and its adapters: python scripts/serve.py --adapter NAME=FILE."""

from lit_adapter.cli.command import run
from lit_adapter.cli.serve import main

if __name__ == "__main__":
    run(main)
