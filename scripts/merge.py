"""Make one plain Hugging Face LLaMA of a base and a V2 adapter without prompts."""

from lit_adapter.command import run
from lit_adapter.weights.cli import merge_main

if __name__ == "__main__":
    run(merge_main)
