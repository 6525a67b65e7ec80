"""The configuration of a fine-tuning run: typed dataclasses, read before torch or lightning is imported."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from lit_adapter.errors import UserError, shorten
from lit_adapter.files.paths import is_unicode
from lit_adapter.model.config import VERSIONS, AdapterConfig, check_fp32

Precision = Literal["auto", "32-true", "bf16-true", "bf16-mixed", "16-mixed", "16-true"]

MOST_WORKERS = 64
"""Each holds pipes open; some hundreds exhaust what a process may open, and it dies without a word."""
DEFAULT_LR = {"v1": 2e-2, "v2": 1e-2}


def _at_least(name: str, value: float | None, least: float) -> None:
    if value is not None and not least <= value < float("inf"):
        raise UserError(f"{name} is {value}; expected {least} or more")


def _expand_home(config: object, *names: str) -> None:
    """Let ``~`` stand for the user's home folder, as saved configurations have it."""
    for name in names:
        value = getattr(config, name)
        if value is not None:
            object.__setattr__(config, name, os.path.expanduser(value))


@dataclass(frozen=True)
class Columns:
    """What the data calls the three fields of a record."""

    instruction: str = "instruction"
    """Must be there; an empty one is an error."""
    input: str = "input"
    """May be absent from the data under its usual name: every input is then empty."""
    output: str = "output"
    """Must be there; records without text in it are left out."""

    def __post_init__(self) -> None:
        names = [getattr(self, item.name) for item in fields(self)]
        if "" in names or len(set(names)) < len(names):
            raise UserError(f"columns: {', '.join(map(shorten, names))}; expected three different names")


@dataclass(frozen=True)
class DataConfig:
    """Which records are learned, and how they become tokens."""

    train: str = ""
    """A JSON, JSONL, CSV or Parquet file, or a Hub data set as org/name."""
    val: str | None = None
    """A file of held-out records; without it val_size records are split off, chosen by the seed."""
    val_size: int | float = 0.1
    """Records to hold out when there is no val file: a count, or a fraction below 1. 0: no validation."""
    columns: Columns = field(default_factory=Columns)
    """Names of the instruction, input and output columns."""
    template: str = "alpaca"
    """alpaca, alpaca-newline, chat (the base's own), a text with {instruction} and {input}, or its file."""
    mask_prompt: bool = True
    """Learn the answer only, not the prompt."""
    max_length: int = 512
    """Longest record in tokens; longer ones lose the start of their prompt, never their answer."""
    workers: int = 0
    """Loader processes that pack batches ahead of the training process."""

    def __post_init__(self) -> None:
        _expand_home(self, "train", "val", "template")
        if self.val == "":
            raise UserError("data.val is empty; name a file, or leave it out to split off data.val_size")
        _at_least("data.max_length", self.max_length, 8)
        _at_least("data.workers", self.workers, 0)
        if self.workers > MOST_WORKERS:
            raise UserError(f"data.workers is {self.workers}; expected {MOST_WORKERS} or less")
        _at_least("data.val_size", self.val_size, 0)
        if isinstance(self.val_size, float) and self.val_size >= 1:
            raise UserError(
                f"data.val_size is {self.val_size}; expected a whole number of records, or a fraction below 1"
            )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW on the adapter's parameters, warm-up, then a decay."""

    batch_size: int = 64
    """Records in one optimizer step, over all devices together."""
    row_tokens: int | None = None
    """Longest packed row: the size of a micro-batch in tokens. null chooses by device. It changes memory
    and speed, not results (but what adapter.dropout draws)."""
    epochs: float = 3.0
    """Passes over the training records."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, whatever epochs says."""
    lr: float | None = None
    """Peak learning rate; where neither lr nor base_lr is given 2e-2, for adapter.version v2 1e-2."""
    base_lr: float | None = None
    """Peak learning rate as in the paper: lr = base_lr * batch_size / 256."""
    lr_scale_v2: float = 0.1
    """adapter.version v2: the rate of its norms, biases and scales, as a share of lr. They do not decay."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up."""
    warmup: int | float = 0.05
    """Warm-up: optimizer steps, or a fraction of the run if below 1."""
    min_lr_ratio: float = 0.0
    """The schedule's last rate, as a share of the peak."""
    weight_decay: float = 0.02
    """AdamW's, of prompts and gates."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's: how much of its two averages stays at each step."""
    eps: float = 1e-8
    """AdamW's: what is added to the root of the second average."""
    clip: float | None = 1.0
    """Largest gradient norm; null switches clipping off."""
    max_bad_steps: int = 5
    """Stop after this many skipped steps (loss or gradient not finite) in a row."""

    def __post_init__(self) -> None:
        _at_least("optim.batch_size", self.batch_size, 1)
        _at_least("optim.row_tokens", self.row_tokens, 8)
        _at_least("optim.max_steps", self.max_steps, 1)
        _at_least("optim.warmup", self.warmup, 0)
        _at_least("optim.max_bad_steps", self.max_bad_steps, 1)
        if not 0 < self.epochs < float("inf"):
            raise UserError(f"optim.epochs is {self.epochs}; expected a number above 0")
        check_fp32("optim.eps", self.eps)
        if self.clip is not None:
            check_fp32("optim.clip", self.clip)
        for name in ("lr", "base_lr", "lr_scale_v2", "weight_decay"):
            if getattr(self, name) is not None:
                check_fp32(f"optim.{name}", getattr(self, name), zero=True)
        if self.lr is not None and self.base_lr is not None:
            raise UserError(
                "optim.lr and optim.base_lr are both given; give one (lr = base_lr * batch_size / 256)"
            )
        if not 0 <= self.min_lr_ratio <= 1:
            raise UserError(f"optim.min_lr_ratio is {self.min_lr_ratio}; expected a number from 0 to 1")
        check_fp32("the learning rate, base_lr * batch_size / 256,", self.peak_lr, zero=True)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas is {list(self.betas)}; expected two numbers from 0 to below 1")

    @property
    def peak_lr(self) -> float:
        """The peak learning rate, from whichever of lr and base_lr is given."""
        if self.base_lr is not None:
            return self.base_lr * self.batch_size / 256
        return DEFAULT_LR["v1"] if self.lr is None else self.lr


@dataclass(frozen=True)
class TrainerConfig:
    """Where and how Lightning's Trainer runs, and how often it reports."""

    accelerator: Literal["auto", "cpu", "cuda", "gpu"] = "auto"
    """cuda and gpu are one; CUDA_VISIBLE_DEVICES chooses among several GPUs."""
    devices: int | str = 1
    """Devices per node: a number, or auto for all."""
    num_nodes: int = 1
    """Nodes, each started by torchrun or SLURM."""
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    """ddp: the base whole on every device. fsdp2: cut over the devices, for bases that do not fit one.
    auto: ddp where there are several devices."""
    tensor_parallel: int = 1
    """fsdp2: devices of a node that share the work of every row, each with some of the heads. They divide
    devices, and the base's key/value heads and MLP width."""
    precision: Precision = "auto"
    """auto: bf16-true where the processor multiplies bf16 faster, else 32-true. The adapter stays in fp32."""
    base_precision: Literal["full", "fp8"] = "full"
    """fp8: the frozen linear layers in 8-bit floats, on Hopper GPUs and later, with precision bf16-true.
    Faster, and no longer exact."""
    recompute: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, slower."""
    log_every: int = 10
    """Optimizer steps between points on the curves."""
    val_every: int | None = None
    """Optimizer steps between validations; null: a tenth of the run's. The first is before any step."""
    save_every: int = 50
    """Optimizer steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    samples: int = 3
    """Held-out records answered as text at each validation."""
    sample_tokens: int = 64
    """Longest sample answer."""
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """A progress bar on a terminal, lines elsewhere."""

    def __post_init__(self) -> None:
        _at_least("trainer.num_nodes", self.num_nodes, 1)
        _at_least("trainer.tensor_parallel", self.tensor_parallel, 1)
        _at_least("trainer.log_every", self.log_every, 1)
        _at_least("trainer.val_every", self.val_every, 1)
        _at_least("trainer.save_every", self.save_every, 1)
        _at_least("trainer.keep_checkpoints", self.keep_checkpoints, 1)
        _at_least("trainer.samples", self.samples, 0)
        _at_least("trainer.sample_tokens", self.sample_tokens, 1)
        if self.precision == "16-true":
            raise UserError(
                "trainer.precision is 16-true; fp16 gradients underflow without a scaler: "
                "use 16-mixed, or bf16-true where the device has bf16"
            )
        if isinstance(self.devices, int):
            _at_least("trainer.devices", self.devices, 1)
        elif self.devices != "auto":
            raise UserError(f"trainer.devices is {self.devices!r}; expected a number or auto")


@dataclass(frozen=True)
class Config:
    """A fine-tuning run."""

    base: str = "checkpoints/smollm2-135m"
    """Folder of the converted base model."""
    out: str = "out/finetune"
    """Run folder: configuration, checkpoints, curves and the adapter."""
    seed: int = 1337
    """Seeds the prompts, the order of the records and the split."""
    init_from: str | None = None
    """An adapter.safetensors on the same base to start from, of the same sizes and gate form."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        _expand_home(self, "base", "out", "init_from")
        if not self.base:
            raise UserError("base is empty; name a converted base folder, checkpoints/NAME")
        if not self.out or "://" in self.out:
            raise UserError(f"out is {self.out!r}; expected a folder of this machine")
        if not is_unicode(self.out):
            raise UserError(
                f"out is {self.out!r}, which is not UTF-8; choose another name, or set PYTHONUTF8=1"
            )
        _at_least("seed", self.seed, 0)
        if self.seed >= 2**64:
            raise UserError(f"seed is {self.seed}; expected a whole number from 0 to 2**64 - 1")
        has_v2_parts = self.adapter.parts != VERSIONS["v1"]
        if not has_v2_parts and self.optim.lr_scale_v2 != OptimConfig.lr_scale_v2:
            raise UserError(f"optim.lr_scale_v2 is {self.optim.lr_scale_v2}; it needs adapter.version v2")
        if has_v2_parts:
            rate = with_learning_rate(self).optim.peak_lr * self.optim.lr_scale_v2
            check_fp32("the rate of V2, lr * lr_scale_v2,", rate, zero=True)
        if self.init_from == "":
            raise UserError("init_from is empty; name an adapter.safetensors, or leave it out")


def with_learning_rate(config: Config) -> Config:
    """Return the run with its adapter's default learning rate where none is given."""
    default = DEFAULT_LR[config.adapter.version]
    is_given = config.optim.lr is not None or config.optim.base_lr is not None
    if is_given or default == config.optim.peak_lr:
        return config
    return replace(config, optim=replace(config.optim, lr=default))
