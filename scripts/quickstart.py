"""Fetch, train, score and show the embedded default: python scripts/quickstart.py."""

from lit_adapter.cli.command import run
from lit_adapter.cli.quickstart import main

if __name__ == "__main__":
    run(main)
