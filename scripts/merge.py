"""Make a plain Hugging Face model of a base and an adapter without prompts."""

from lit_adapter.cli.command import run
from lit_adapter.cli.merge import main

if __name__ == "__main__":
    run(main)
