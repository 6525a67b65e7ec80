"""Make one plain Hugging Face LLaMA of a base and a V2 adapter without prompts."""

from lit_adapter.cli.command import run
from lit_adapter.cli.merge import main

if __name__ == "__main__":
    run(main)
