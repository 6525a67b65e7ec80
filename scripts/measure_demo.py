"""What affects how well the demo is learned: one change at a time, scored on the held-out requests.

python scripts/measure_demo.py --base checkpoints/smollm2-135m --json OUT.json
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from lit_adapter.cli.command import command_parser, parse, run
from lit_adapter.cli.finetune import parse_finetune
from lit_adapter.cli.quickstart import CONFIG
from lit_adapter.data import demo
from lit_adapter.files.write import write_json
from lit_adapter.quickstart import scoring

# Name, training records, options that differ from configs/quickstart.yaml.
VARIANTS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("as the quickstart", 2000, ()),
    ("500 records, 4 epochs", 500, ("--optim.epochs", "4")),
    ("1,000 records, 2 epochs", 1000, ("--optim.epochs", "2")),
    ("4,000 records", 4000, ()),
    ("twice the steps", 2000, ("--optim.epochs", "2")),
    ("lr 1e-2", 2000, ("--optim.lr", "1e-2")),
    ("lr 3e-2", 2000, ("--optim.lr", "3e-2")),
    ("prompts N(0, 1)", 2000, ("--adapter.prompt_init_std", "1.0")),
    ("K 20", 2000, ("--adapter.prompt_length", "20")),
    ("fp8 base", 2000, ("--trainer.base_precision", "fp8")),
)
NEEDS_GPU = "fp8 base"


def main(argv: Sequence[str]) -> int:
    """Train and score every variant."""
    parser = command_parser("Ablation of the demo.")
    parser.add_argument("--base", type=str, default="checkpoints/smollm2-135m")
    parser.add_argument("--json", type=str, required=True, help="where the rows go")
    names = [name for name, *_ in VARIANTS]
    parser.add_argument("--variants", nargs="+", choices=names, help="default: all this machine can run")
    args = parse(parser, argv)
    import torch

    wanted = args.variants or [name for name in names if name != NEEDS_GPU or torch.cuda.is_available()]
    rows = []
    print("| variant | exact match | held-out loss | seconds |\n|---|---:|---:|---:|")
    for name, n_train, options in (variant for variant in VARIANTS if variant[0] in wanted):
        with tempfile.TemporaryDirectory() as scratch:
            row = {"variant": name, **measure(Path(scratch), Path(args.base), n_train, options)}
        rows.append(row)
        write_json(Path(args.json), rows)
        print(f"| {name} | {row['exact_match']:.1%} | {row['loss']:.4f} | {row['seconds']:.0f} |", flush=True)
    return 0


def measure(folder: Path, base: Path, n_train: int, options: Sequence[str]) -> dict[str, float]:
    """Train one variant and return its scores."""
    from lit_adapter.evaluation.evaluate import evaluate
    from lit_adapter.training.finetune import finetune

    train, val = demo.write(folder, 0, n_train)
    paths = [f"--base={base}", f"--out={folder / 'run'}", f"--data.train={train}", f"--data.val={val}"]
    quiet = ["--trainer.val_every", "100000", "--trainer.samples", "0"]
    config = parse_finetune([f"--config={CONFIG}", *paths, *quiet, *options]).config
    start = time.perf_counter()
    finetune(config, say=lambda line: print(line, file=sys.stderr))
    seconds = time.perf_counter() - start
    settings = scoring(folder / "run" / "adapter.safetensors", base, val, folder / "evaluation")
    scores = list(evaluate(settings, lambda line: None)["scores"].values())[-1]
    return {
        "exact_match": scores["json_exact"]["value"],
        "loss": scores["loss"]["value"],
        "seconds": seconds,
    }


if __name__ == "__main__":
    run(main)
