"""Talk to a base with its adapter: python scripts/chat.py --adapter FILE."""

from lit_adapter.cli.chat import main
from lit_adapter.cli.command import run

if __name__ == "__main__":
    run(main)
