"""Prompt a base with its adapter: python scripts/generate.py --adapter FILE --prompt TEXT."""

from lit_adapter.cli.command import run
from lit_adapter.cli.generate import main

if __name__ == "__main__":
    run(main)
