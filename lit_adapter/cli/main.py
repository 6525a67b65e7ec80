"""The console script ``lit-adapter COMMAND ...``: the commands of ``scripts/`` in an installed package."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import NoReturn

from lit_adapter.cli.command import run
from lit_adapter.errors import UserError, nearest
from lit_adapter.streams import say

COMMANDS = {
    "quickstart": "Fine-tune and score a small built-in model, from scratch.",
    "download": "Fetch a model and convert it into a base folder, or fetch an adapter.",
    "convert": "Turn a checkpoint into a base folder.",
    "finetune": "Train a small adapter on a frozen LLaMA: a gated prefix, norms, LoRA.",
    "chat": "Talk to a base with its adapter, or to a plain base.",
    "generate": "Prompt a base with its adapter, or a plain base.",
    "evaluate": "Score adapters beside their base, and write a report.",
    "serve": "Serve a base and its adapters with OpenAI's interface and a chat page.",
    "convert-adapter": "Turn an adapter of another code base into ours, or ours into theirs.",
    "merge": "Make a plain Hugging Face model of a base and an adapter without prompts.",
    "compare": "Show runs side by side: settings, results, curves and cost.",
    "export": "Write an adapter for transformers, vLLM, llama.cpp or Ollama.",
    "push": "Put an adapter and its model card on the Hugging Face Hub.",
}
"""What each command does. Its module has the same name."""


def main(argv: Sequence[str], program: str = "lit-adapter") -> int:
    """Run the command that ``argv`` begins with.

    Raises:
        UserError: there is no such command, or what the command raises.
    """
    if not argv or argv[0] in ("-h", "--help"):
        say(f"usage: {program} COMMAND ...\n\ncommands ({program} COMMAND --help says more):")
        for name, line in COMMANDS.items():
            say(f"  {name:<16} {line}")
        return 0
    name = argv[0].replace("_", "-")
    if name not in COMMANDS:
        hint = nearest(argv[0], list(COMMANDS)) or f"; see {program} --help"
        raise UserError(f"unknown command '{argv[0]}'{hint}")
    module = import_module(f"lit_adapter.cli.{name.replace('-', '_')}")
    status: int = module.main(argv[1:], f"{program} {name}")
    return status


def console_script(program: str = "lit-adapter") -> NoReturn:
    """Run `main` on the command line and exit with its status."""
    run(partial(main, program=program))
