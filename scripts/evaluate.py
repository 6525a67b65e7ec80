"""Score adapters beside their base: python scripts/evaluate.py --adapter FILE --data FILE --out FOLDER."""

from lit_adapter.cli.command import run
from lit_adapter.cli.evaluate import main

if __name__ == "__main__":
    run(main)
