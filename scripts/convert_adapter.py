"""Turn an adapter of another code base into ours, or ours into theirs."""

from lit_adapter.command import run
from lit_adapter.weights.foreign.cli import convert_adapter_main

if __name__ == "__main__":
    run(convert_adapter_main)
