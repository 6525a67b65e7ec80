"""Show runs side by side: settings, results, curves and cost."""

from lit_adapter.cli.command import run
from lit_adapter.cli.compare import main

if __name__ == "__main__":
    run(main)
