"""Put an adapter and its model card on the Hugging Face Hub."""

from lit_adapter.command import run
from lit_adapter.weights.cli import push_main

if __name__ == "__main__":
    run(push_main)
