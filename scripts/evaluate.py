"""Score adapters beside their base: python scripts/evaluate.py --adapter FILE --data HELD_OUT --out FOLDER."""

from lit_adapter.cli.command import run
from lit_adapter.cli.evaluate import main

if __name__ == "__main__":
    run(main)
