"""Train an adapter: python scripts/finetune.py --config configs/quickstart.yaml."""

from lit_adapter.cli import finetune_main
from lit_adapter.command import run

if __name__ == "__main__":
    run(finetune_main)
