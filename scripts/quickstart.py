"""Everything at once on the embedded default: python scripts/quickstart.py."""

from lit_adapter.command import run
from lit_adapter.quickstart import quickstart_main

if __name__ == "__main__":
    run(quickstart_main)
