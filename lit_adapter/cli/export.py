from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_adapter.cli.command import command_parser, parse, shown
from lit_adapter.cli.main import COMMANDS
from lit_adapter.progress import byte_progress
from lit_adapter.streams import say
from lit_adapter.weights.adapter_search import find_adapter


def main(argv: Sequence[str], program: str | None = None) -> int:
    """Parse, export, and print the report."""
    parser = command_parser(COMMANDS["export"], program)
    parser.add_argument("adapter", help="a run's folder, or its adapter.safetensors or best.safetensors")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument(
        "--base",
        type=Path | None,
        metavar="FOLDER",
        help="base folder; by default the one that the adapter names",
    )
    parser.add_argument(
        "--to",
        choices=["transformers", "gguf"],
        default="transformers",
        help="transformers, also for vLLM; gguf, without prompts, for llama.cpp and Ollama",
    )
    parser.add_argument(
        "--type",
        choices=["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"],
        help="type of the matrices in a GGUF file; default: q8_0",
    )
    parser.add_argument(
        "--with-base", action="store_true", help="put the base into the folder too; vLLM needs it there"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of a base in the folder; by default its own, or float32 if something is merged into it",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    options = parse(parser, argv)

    from lit_adapter.weights.export.export import export

    choices = {name: options[name] for name in ("base", "to", "with_base", "dtype", "overwrite")}
    with byte_progress("exporting") as progress:
        report = export(
            find_adapter(options.adapter), Path(options.out), kind=options.type, progress=progress, **choices
        )
    say(f"wrote {shown(Path(options.out))}: {'; '.join(report)}")
    return 0
