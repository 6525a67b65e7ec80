"""Compare what adapters learn from the same batches: ours, PEFT's AdaptionPrompt and PEFT's LoRA.

    python scripts/measure_peers.py --data RECORDS.json --json peers.json

Every run sees the same token ids in the same optimizer steps, with the same schedule, clipping and
token-weighted loss; only the adapter and its optimizer settings differ. PEFT's adapters run on
transformers' LLaMA with padded batches and PyTorch's loss, so that only the data is shared with ours.
Untrained adapters change nothing, so all of them must start from the same held-out loss on the same
targets; the script prints whether they do. Losses are in nats per answer token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_adapter.cli.command import check_least, command_parser, parse, run


def read_options(argv: Sequence[str]) -> Any:
    """Return the command line's options."""
    parser = command_parser("Compare adapters on the same batches.")
    parser.add_argument("--data", required=True, help="a file of records")
    parser.add_argument("--base", default="checkpoints/smollm2-135m", help="folder of the converted base")
    parser.add_argument("--held-out", type=int, default=250, help="number of held-out records")
    parser.add_argument("--batch", type=int, default=32, help="records in an optimizer step")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, help="length of each run, whatever --epochs says")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these methods")
    parser.add_argument(
        "--subset", choices=["all", "quick"], default="all", help="quick: one learning rate a method"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of the frozen base"
    )
    parser.add_argument(
        "--seed", type=int, default=1337, help="seed of the split, the order and the initial adapters"
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows to this file after every run")
    options = parse(parser, argv)
    check_least(options, 1, "held_out", "batch", "max_steps")
    check_least(options, 0, "seed")
    return options


def main(argv: Sequence[str]) -> int:
    """Run the comparison; the status is 1 if it was not fair."""
    options = read_options(argv)
    from benchmarks.peers import compare

    return compare(options)


if __name__ == "__main__":
    run(main)
