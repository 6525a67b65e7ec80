"""Train an adapter: python scripts/finetune.py --config configs/quickstart.yaml."""

from lit_adapter.cli.command import run
from lit_adapter.cli.finetune import main

if __name__ == "__main__":
    run(main)
