"""Put an adapter and its model card on the Hugging Face Hub."""

from lit_adapter.cli.command import run
from lit_adapter.cli.push import main

if __name__ == "__main__":
    run(main)
