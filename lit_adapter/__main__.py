"""``python -m lit_adapter COMMAND ...``: the same as the console script."""

from lit_adapter.cli.main import console_script

if __name__ == "__main__":
    console_script("python -m lit_adapter")
