"""Turn an adapter of another code base into ours, or ours into theirs."""

from lit_adapter.cli.command import run
from lit_adapter.cli.convert_adapter import main

if __name__ == "__main__":
    run(main)
