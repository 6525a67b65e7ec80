"""Prompt a base with its adapter: python scripts/generate.py --adapter FILE --prompt TEXT."""

from lit_adapter.cli import generate_main
from lit_adapter.command import run

if __name__ == "__main__":
    run(generate_main)
