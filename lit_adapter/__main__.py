"""``python -m lit_adapter COMMAND ...``: the console script by another door."""

from functools import partial

from lit_adapter.cli.command import run
from lit_adapter.cli.main import main

if __name__ == "__main__":
    run(partial(main, program="python -m lit_adapter"))
