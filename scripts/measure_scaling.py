"""Measure runs on several devices of this machine: tokens/s, efficiency against one, peak memory of each.

    python scripts/measure_scaling.py --tokenizer checkpoints/smollm2-135m --shape 7b \
        --layouts ddp:1 ddp:2 fsdp2:2 --data my_records.json

Every layout is a real run of scripts/finetune.py on a base of random weights, which is written once, below
--out. A step has --records records per device, so that every device does the same work. Options after `--`
are passed to the runs, for example `-- --trainer.recompute true`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lit_adapter.cli.command import check_least, command_parser, parse, run
from lit_adapter.cli.finetune import main as finetune_main
from lit_adapter.cli.finetune import parse_finetune
from lit_adapter.errors import UserError

RESULT = "LIT_ADAPTER_MEASURED"
"""Environment variable of the runs: the folder where each process writes what it measured."""
SIZES = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"
SHAPES = {
    "tiny": (64, 96, 4, 4, 4),
    "7b": (4096, 11_008, 32, 32, 32),
    "13b": (5120, 13_824, 40, 40, 40),
    "70b": (8192, 28_672, 80, 64, 8),
}


def main(argv: Sequence[str]) -> int:
    """Write the base, run every layout and print the table."""
    asked = read_options(argv)
    base = random_base(asked.shape, asked.tokenizer, asked.out / asked.shape)
    reference: float | None = None
    print(f"{'layout':10} {'tokens/s':>10} {'a device':>10} {'efficiency':>10}  peak GB of each device")
    for layout in asked.layouts:
        strategy, _, devices = layout.partition(":")
        ranks = train(asked, base, strategy, int(devices))
        speed = statistics.median(rank["tokens_per_s"] for rank in ranks)
        reference = reference or speed / len(ranks)
        peaks = " ".join(f"{rank['peak_bytes'] / 1e9:.1f}" for rank in ranks)
        each = speed / len(ranks)
        print(f"{layout:10} {speed:10,.0f} {each:10,.0f} {each / reference:10.1%}  {peaks}", flush=True)
    return 0


def read_options(argv: Sequence[str]) -> Any:
    """Return the command line's options; ``rest`` is what follows ``--``.

    Raises:
        UserError: a mistake in it, or a layout that this machine cannot run.
    """
    parser = command_parser("Measure runs on several devices of this machine.")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="a converted base whose tokenizer to use"
    )
    parser.add_argument("--data", type=Path, required=True, help="a file of records")
    parser.add_argument("--shape", choices=list(SHAPES), default="7b", help="sizes of the random base")
    parser.add_argument(
        "--layouts", nargs="+", default=["ddp:1"], help="STRATEGY:DEVICES each; the first is the reference"
    )
    parser.add_argument("--records", type=int, default=64, help="records per step and device")
    parser.add_argument("--steps", type=int, default=30, help="steps; the last two thirds are measured")
    parser.add_argument("--out", type=Path, default=Path("out/scaling"), help="folder for bases and runs")
    words = list(argv)
    own = words.index("--") if "--" in words else len(words)
    asked = parse(parser, words[:own])
    asked.rest = words[own + 1 :]
    check_least(asked, 1, "records")
    check_least(asked, 3, "steps")
    for path, kind in ((asked.tokenizer / "config.json", "--tokenizer"), (asked.data, "--data")):
        if not path.is_file():
            raise UserError(f"{kind}: {path} not found")
    for layout in asked.layouts:
        check_this_layout(layout, asked.rest)
    return asked


def check_this_layout(layout: str, rest: list[str]) -> None:
    """Check that this machine can run a layout, before anything is written.

    Raises:
        UserError: it cannot, or the layout or an option of the runs is wrong.
    """
    from lit_adapter.device import choose_device
    from lit_adapter.training.strategy import check_layout

    if not re.fullmatch(r"(ddp|fsdp2):[1-9]\d{0,3}", layout):
        raise UserError(f"--layouts {layout}: expected ddp:DEVICES or fsdp2:DEVICES")
    strategy, _, devices = layout.partition(":")
    chosen = ["--trainer.strategy", strategy, "--trainer.devices", devices]
    options = parse_finetune([*chosen, *rest]).config.trainer
    check_layout(options, choose_device(options.accelerator))


def random_base(shape: str, tokenizer: Path, out: Path) -> Path:
    """Write a converted base of random bf16 weights, one file a layer, drawn on the GPU if there is one."""
    import torch
    from safetensors.torch import save_file

    from lit_adapter.model.config import LlamaConfig
    from lit_adapter.model.layout import base_shapes
    from lit_adapter.weights.base_content import small_file_digests, tensor_checksums
    from lit_adapter.weights.base_folder import FORMAT_VERSION, TOKENIZER_FILES, tokenizer_fingerprint

    if (out / "fingerprint.json").is_file():
        return out
    out.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, out)
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    described: dict[str, Any] = {"model_type": "llama", "vocab_size": vocabulary}
    described |= zip(SIZES, SHAPES[shape], strict=True)
    described |= {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
    (out / "config.json").write_text(json.dumps(described))
    files: dict[str, dict[str, torch.Tensor]] = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, size in base_shapes(LlamaConfig.from_hf(described)).items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        values = torch.empty(size, dtype=torch.bfloat16, device=device)
        values = values.fill_(1.0) if len(size) == 1 else values.normal_(0.0, 0.02)
        files.setdefault(part, {})[name] = values.cpu()
        if part != "rest" and name.endswith("down_proj.weight"):
            save_file(files.pop(part), out / f"model-{int(part):05d}.safetensors")
    save_file(files["rest"], out / "model-rest.safetensors")
    fingerprint = {
        "format": FORMAT_VERSION,
        "weights": f"random {shape}",
        "tokenizer": tokenizer_fingerprint(out),
        "files": {path.name: path.stat().st_size for path in sorted(out.iterdir())},
        "file_sha256": small_file_digests(out),
        "tensor_crc32": tensor_checksums(out),
        "source": {},
    }
    (out / "fingerprint.json").write_text(json.dumps(fingerprint))
    return out


def train(asked: Any, base: Path, strategy: str, devices: int) -> list[dict[str, float]]:
    """Train a few steps on a layout and return what each process measured."""
    folder = asked.out / f"{asked.shape}-{strategy}-{devices}"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "measured").mkdir(parents=True)
    options = {
        "base": base,
        "out": folder / "run",
        "data.train": asked.data,
        "data.val_size": 0,
        "data.workers": 2,
        "optim.batch_size": asked.records * devices,
        "optim.max_steps": asked.steps,
        "optim.epochs": 1000,
        "trainer.devices": devices,
        "trainer.strategy": strategy,
        "trainer.save_every": 1000,
    }
    arguments = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    environment = os.environ | {RESULT: str(folder / "measured")}
    done = subprocess.run([sys.executable, __file__, *arguments, *asked.rest], env=environment)
    if done.returncode:
        raise UserError(f"{strategy}:{devices} ended with status {done.returncode}; see above")
    return [json.loads(path.read_text()) for path in sorted((folder / "measured").iterdir())]


def measured_run(folder: Path) -> None:
    """Be one process of a run: scripts/finetune.py with a clock."""
    import lightning.pytorch as pl
    import torch

    on_gpu = torch.cuda.is_available()

    class Clock(pl.Callback):
        """Times optimizer steps and writes speed and memory at the end."""

        def __init__(self) -> None:
            self.ends: list[tuple[float, float]] = []
            """When each step ended, and its tokens."""

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            """Note when a step has ended, and its tokens."""
            if on_gpu:
                torch.cuda.synchronize()
            self.ends.append((time.perf_counter(), pl_module.last["tokens"]))

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            """Write down the median of the last two thirds."""
            measured = pairwise(self.ends[len(self.ends) // 3 :])
            speed = statistics.median(tokens / (end - start) for (start, _), (end, tokens) in measured)
            peak = torch.cuda.max_memory_allocated() if on_gpu else 0
            found = {"tokens_per_s": speed, "peak_bytes": peak}
            (folder / f"rank-{trainer.global_rank:03d}.json").write_text(json.dumps(found))

    fit = pl.Trainer.fit

    def timed(trainer: Any, *args: Any, **kwargs: Any) -> None:
        trainer.callbacks.append(Clock())
        fit(trainer, *args, **kwargs)

    pl.Trainer.fit = timed  # type: ignore[method-assign]
    run(finetune_main)


if __name__ == "__main__":
    if RESULT in os.environ:
        measured_run(Path(os.environ[RESULT]))
    else:
        run(main)
