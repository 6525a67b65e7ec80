"""The configuration of a fine-tuning run: typed dataclasses, read before torch and lightning are imported."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lit_adapter.errors import UserError, shorten
from lit_adapter.files.paths import is_unicode
from lit_adapter.model.config import AdapterConfig, check_fp32
from lit_adapter.model.lora_config import LoraConfig

Precision = Literal["auto", "32-true", "bf16-true", "bf16-mixed", "16-mixed", "16-true"]

MOST_WORKERS = 64
"""Each worker holds pipes open; some hundreds reach the limit of open files, which ends a run silently."""
DEFAULT_LR = {"v1": 2e-2, "v2": 1e-2}
LORA_SHARE, LORA_RANKS = 0.3, 8
"""LoRA's share of the learning rate, if the ranks of a block's updates add up to no more than this."""


def _at_least(least: float, section: object, prefix: str, *names: str) -> None:
    """Check the numbers of a section; None passes."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not least <= value < float("inf"):
            raise UserError(f"{prefix}{name} is {value}; expected {least} or more")


def _read_paths(config: object, prefix: str, *names: str) -> None:
    """Refuse paths that are not UTF-8, as saved files must be; replace ``~`` by the user's home folder."""
    for name in names:
        value = getattr(config, name)
        for path in [value] if isinstance(value, str) else value or []:
            if not is_unicode(path):
                advice = "choose another name, or set PYTHONUTF8=1"
                raise UserError(f"{prefix}{name} is {path!r}, which is not UTF-8; {advice}")
        expand = os.path.expanduser
        expanded = expand(value) if isinstance(value, str) else value and [*map(expand, value)]
        object.__setattr__(config, name, expanded)


@dataclass(frozen=True)
class Columns:
    """The data's names for the fields of a record."""

    instruction: str = "instruction"
    """Required; an empty instruction is an error."""
    input: str = "input"
    """Data may lack the column of the default name: every input is then empty."""
    output: str = "output"
    """Required; records whose output is empty are left out."""
    messages: str = "messages"
    """A conversation: a list of objects with role and content."""
    conversations: str = "conversations"
    """The same in ShareGPT's form: a list of objects with from and value."""
    tools: str = "tools"
    """What the assistant of a conversation may call; data may lack it."""
    prompt: str = "prompt"
    """A text, or a list of messages, to which completion is the answer."""
    completion: str = "completion"
    """The answer to prompt, of the same kind."""
    text: str = "text"
    """A text to be learned unchanged."""

    def __post_init__(self) -> None:
        names = [self.instruction, self.input, self.output]
        if "" in vars(self).values() or len(set(names)) < len(names):
            raise UserError(f"columns: {', '.join(map(shorten, names))}; expected three different names")


@dataclass(frozen=True)
class DataConfig:
    """The training records, and how they become tokens."""

    train: list[str] | str = ""
    """A JSON, JSONL, CSV, TSV or Parquet file, a folder of them, a pattern such as 'chats/*.jsonl', or a data
    set on the Hugging Face Hub as org/name, org/name:SPLIT or org/name:SUBSET:SPLIT; or a list of these."""
    weights: list[float] | None = None
    """Shares of the sources in train, in their order: with [3, 1] three of every four records come from the
    first. null: every record once per epoch."""
    val: list[str] | str | None = None
    """Held-out records, given as in train; without them, val_size records are split off by the seed."""
    val_size: int | float = 0.1
    """Records to hold out if there is no val file: a number, or a fraction below 1. 0: no validation."""
    format: Literal["auto", "alpaca", "messages", "conversations", "prompt_completion", "text"] = "auto"
    """What a record is: instruction, input and output (alpaca); a conversation in OpenAI's form (messages) or
    ShareGPT's (conversations); prompt and completion; or a plain text. auto: recognised by the columns of
    the first record."""
    columns: Columns = field(default_factory=Columns)
    """Names of the columns."""
    template: str = "auto"
    """How a record becomes a text: alpaca, alpaca-newline, chat (the base's own chat template), chatml,
    llama3, mistral, alpaca-chat, a text with {instruction} and {input}, its file, or a chat template's file
    NAME.jinja. auto: alpaca, or for conversations chat; for a base without one chatml or alpaca-chat."""
    mask_prompt: bool = True
    """Train on the answers only, not on prompts and users' messages."""
    last_answer_only: bool = False
    """Train on the last answer of a conversation only."""
    max_length: int = 512
    """Longest record, in tokens. A longer one loses the start of its prompt, never any of its answer; a
    conversation loses its first turns, but not its system prompt; a text loses its end."""
    drop_duplicates: bool = False
    """Leave out training records that repeat an earlier one or are held out. They are always counted."""
    stream: bool = False
    """Read the records of train during training, without downloading or keeping them: JSON Lines and Parquet,
    for data larger than the disk. It needs optim.max_steps, optim.batch_size, and val or val_size 0."""
    workers: int = 0
    """Processes that pack batches ahead of training, and encode a stream; 0: the training process itself."""

    def __post_init__(self) -> None:
        _read_paths(self, "data.", "train", "val", "template")
        if self.val in ("", []):
            raise UserError("data.val is empty; name a file, or leave it out to split off data.val_size")
        if self.weights is not None:
            self._check_weights(self.weights)
        if self.last_answer_only and not self.mask_prompt:
            raise UserError(
                "data.last_answer_only true and data.mask_prompt false exclude each other; set one"
            )
        if self.stream:
            self._check_stream()
        _at_least(8, self, "data.", "max_length")
        _at_least(0, self, "data.", "workers", "val_size")
        if self.workers > MOST_WORKERS:
            raise UserError(f"data.workers is {self.workers}; expected {MOST_WORKERS} or less")
        if isinstance(self.val_size, float) and self.val_size >= 1:
            raise UserError(
                f"data.val_size is {self.val_size}; expected a whole number of records, or a fraction below 1"
            )

    def _check_stream(self) -> None:
        """Refuse settings that need all records."""
        if self.weights is not None or self.drop_duplicates:
            what = "weights" if self.weights is not None else "drop_duplicates"
            raise UserError(
                f"data.stream true and data.{what} exclude each other: the second needs all records; set one"
            )
        if self.val is None and self.val_size:
            raise UserError(
                "data.stream true cannot split off data.val_size, which needs to know all records; name "
                "held-out records with data.val, or set data.val_size 0"
            )

    def _check_weights(self, weights: list[float]) -> None:
        n_sources = 1 if isinstance(self.train, str) else len(self.train)
        if len(weights) != n_sources:
            raise UserError(
                f"data.weights has {len(weights)} numbers, but data.train names {n_sources}; give one each"
            )
        if not all(0 <= weight < float("inf") for weight in weights) or not sum(weights):
            raise UserError(
                f"data.weights is {weights}, with the sum {sum(weights):g}; expected numbers of 0 or more, "
                "not all of them 0"
            )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW on the adapter's parameters, with a warm-up and then a decay of the learning rate."""

    batch_size: int | None = None
    """Records in one optimizer step, summed over all devices; null: 4 to 64, for 100 steps or more."""
    row_tokens: int | None = None
    """Longest packed row, which is a micro-batch, in tokens; null: chosen by device. It changes memory and
    speed, and results only through what dropout draws."""
    epochs: float | None = None
    """Passes over the training records; null: 3, or up to 8 where steps of 4 records make fewer than 100."""
    max_steps: int | None = None
    """End the run after this many optimizer steps, whatever epochs says."""
    lr: float | None = None
    """Peak learning rate. Without lr and base_lr it is 2e-2, or 1e-2 in steps of fewer than 16 records and
    for adapter.version v2."""
    base_lr: float | None = None
    """Peak learning rate in the paper's form: lr = base_lr * batch_size / 256."""
    lr_scale_lora: float | None = None
    """adapter.lora: learning rate of the updates, as a share of lr; null: 0.3, and less where the ranks of a
    block's updates add up to more than 8. No weight decay."""
    lr_scale_v2: float = 0.1
    """adapter.version v2: learning rate of norms, biases and scales, as a share of lr. No weight decay."""
    lr_scale_norms: float = 0.1
    """adapter.norms: learning rate of norms, as a share of lr. No weight decay."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: int | float = 0.05
    """Length of the warm-up: optimizer steps, or a fraction of the run if below 1."""
    min_lr_ratio: float = 0.0
    """Last learning rate of the schedule, as a share of the peak."""
    weight_decay: float = 0.02
    """AdamW's weight decay of prompts and gates."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two running averages."""
    eps: float = 1e-8
    """AdamW's epsilon, added to the root of the second average."""
    clip: float | None = 1.0
    """Largest gradient norm; null: no clipping."""
    max_bad_steps: int = 5
    """End the run after this many steps in a row were skipped for a NaN or infinite loss or gradient."""

    def __post_init__(self) -> None:
        _at_least(1, self, "optim.", "batch_size", "max_steps", "max_bad_steps")
        _at_least(8, self, "optim.", "row_tokens")
        _at_least(0, self, "optim.", "warmup")
        if self.epochs is not None and not 0 < self.epochs < float("inf"):
            raise UserError(f"optim.epochs is {self.epochs}; expected a number above 0")
        shares = ("lr_scale_v2", "lr_scale_norms", "lr_scale_lora")
        for name in ("eps", "clip", "lr", "base_lr", *shares, "weight_decay"):
            if getattr(self, name) is not None:
                check_fp32(f"optim.{name}", getattr(self, name), zero=name not in ("eps", "clip"))
        if self.lr is not None and self.base_lr is not None:
            raise UserError(
                "optim.lr and optim.base_lr are both given; give one (lr = base_lr * batch_size / 256)"
            )
        if self.base_lr is not None and self.batch_size is None:
            raise UserError("optim.base_lr needs optim.batch_size: lr = base_lr * batch_size / 256")
        if not 0 <= self.min_lr_ratio <= 1:
            raise UserError(f"optim.min_lr_ratio is {self.min_lr_ratio}; expected a number from 0 to 1")
        check_fp32("the learning rate, base_lr * batch_size / 256,", self.peak_lr, zero=True)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas is {list(self.betas)}; expected two numbers from 0 to below 1")

    @property
    def peak_lr(self) -> float:
        """The peak learning rate, from lr or base_lr, whichever is given."""
        if self.base_lr is not None and self.batch_size is not None:
            return self.base_lr * self.batch_size / 256
        return DEFAULT_LR["v1"] if self.lr is None else self.lr


@dataclass(frozen=True)
class TrainerConfig:
    """Where and how Lightning's Trainer runs, and how often it reports."""

    accelerator: Literal["auto", "cpu", "cuda", "gpu"] = "auto"
    """cuda and gpu mean the same; CUDA_VISIBLE_DEVICES chooses among several GPUs."""
    devices: int | str = 1
    """Devices per node: a number, or auto for all of them."""
    num_nodes: int = 1
    """Number of nodes; torchrun or SLURM starts each of them."""
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    """ddp: every device holds the whole base. fsdp2: the base is sharded over the devices, for bases that
    do not fit on one. auto: ddp if there are several devices."""
    tensor_parallel: int = 1
    """fsdp2: number of devices in a node that share the work of every row, each with some of the attention
    heads. It must divide devices, and the base's key/value heads and MLP width."""
    whole_layers: int | str = "auto"
    """fsdp2: layers that every device keeps whole, so that they are not gathered in each step. auto: on GPUs,
    as many as fit into nine tenths of the free memory; on a CPU, none."""
    precision: Precision = "auto"
    """auto: bf16-true if the device multiplies bf16 faster, else 32-true. The adapter stays in fp32."""
    base_precision: Literal["full", "fp8"] = "full"
    """fp8: the frozen linear layers in 8-bit floats, on Hopper and later GPUs, with precision bf16-true.
    Faster, and no longer exact."""
    recompute: bool = False
    """Keep only each layer's input for the backward pass and recompute the rest: less memory, slower."""
    log_every: int = 10
    """Optimizer steps between points on the curves."""
    val_every: int | None = None
    """Optimizer steps between validations; null: a tenth of the run, at least 10. The first one is before any
    step."""
    save_every: int = 50
    """Optimizer steps between checkpoints."""
    keep_checkpoints: int = 2
    """Number of checkpoints kept, the newest ones."""
    samples: int = 3
    """Held-out records for which answers are generated at each validation."""
    sample_tokens: int = 64
    """Longest of these answers, in tokens."""
    logger: Literal["tensorboard", "csv", "wandb", "mlflow"] = "tensorboard"
    """Where the curves go: RUN/tensorboard, RUN/csv, or, with their packages, Weights & Biases (also with
    WANDB_MODE=offline) and MLflow (RUN/mlruns, or MLFLOW_TRACKING_URI)."""
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """auto: a progress bar on a terminal, lines elsewhere."""

    def __post_init__(self) -> None:
        _at_least(1, self, "trainer.", "num_nodes", "tensor_parallel", "log_every", "val_every", "save_every")
        _at_least(1, self, "trainer.", "keep_checkpoints", "sample_tokens")
        _at_least(0, self, "trainer.", "samples")
        if self.precision == "16-true":
            raise UserError(
                "trainer.precision is 16-true; fp16 gradients underflow without a scaler: "
                "use 16-mixed, or bf16-true where the device has bf16"
            )
        if isinstance(self.devices, int):
            _at_least(1, self, "trainer.", "devices")
        elif self.devices != "auto":
            raise UserError(f"trainer.devices is {self.devices!r}; expected a number or auto")
        if isinstance(self.whole_layers, int):
            _at_least(0, self, "trainer.", "whole_layers")
        elif self.whole_layers != "auto":
            raise UserError(f"trainer.whole_layers is {self.whole_layers!r}; expected a number or auto")


@dataclass(frozen=True)
class Config:
    """A fine-tuning run."""

    base: str = "checkpoints/smollm2-135m"
    """Folder of the converted base model."""
    out: str = "out/finetune"
    """Run folder: configuration, checkpoints, curves and the adapter."""
    seed: int = 1337
    """Seed of the initial prompts, of the order of the records and of the split."""
    init_from: str | None = None
    """Initial adapter: the file or run folder of an adapter of the same base, sizes and form."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        _read_paths(self, "", "base", "out", "init_from")
        if not self.base:
            raise UserError("base is empty; name a converted base folder, checkpoints/NAME")
        if not self.out or "://" in self.out:
            raise UserError(f"out is {self.out!r}; expected a folder on this machine")
        _at_least(0, self, "", "seed")
        if self.seed >= 2**64:
            raise UserError(f"seed is {self.seed}; expected a whole number from 0 to 2**64 - 1")
        is_v2 = self.adapter.version == "v2"
        _check_share(self, "lr_scale_v2", "adapter.version v2", "V2", is_used=is_v2)
        needed = "adapter.norms true with version v1; v2 has lr_scale_v2" if is_v2 else "adapter.norms true"
        has_norms = "norms" in self.adapter.parts and not is_v2
        _check_share(self, "lr_scale_norms", needed, "norms", is_used=has_norms)
        _check_share(self, "lr_scale_lora", "adapter.lora.rank", "LoRA", is_used=self.adapter.lora.rank > 0)
        missing = [f"optim.{key}" for key in ("max_steps", "batch_size") if getattr(self.optim, key) is None]
        if self.data.stream and missing:
            raise UserError(
                f"data.stream true needs {' and '.join(missing)}: the length of a stream is not known"
            )
        if self.init_from == "":
            raise UserError("init_from is empty; name an adapter.safetensors, or leave it out")


def _check_share(config: Config, name: str, needed: str, of: str, *, is_used: bool) -> None:
    """Check a share of the learning rate, which only some adapters use."""
    share = getattr(config.optim, name)
    if not is_used and share != getattr(OptimConfig, name):
        raise UserError(f"optim.{name} is {share}; it needs {needed}")
    if is_used:
        optim = with_learning_rate(config).optim
        rate = optim.peak_lr * getattr(optim, name)
        check_fp32(f"the learning rate of {of}, lr * {name},", rate, zero=True)


def with_learning_rate(config: Config) -> Config:
    """Return the configuration with its adapter's default learning rate, and LoRA's share, if not given."""
    optim, lora = config.optim, config.adapter.lora
    default = DEFAULT_LR[config.adapter.version]
    is_given = optim.lr is not None or optim.base_lr is not None
    if not is_given and default != optim.peak_lr:
        optim = replace(optim, lr=default)
    if lora.rank and optim.lr_scale_lora is None:
        optim = replace(optim, lr_scale_lora=lora_share(lora))
    return replace(config, optim=optim) if optim is not config.optim else config


def lora_share(lora: LoraConfig) -> float:
    """Return LoRA's default share of the learning rate; docs/learning.md has the figures behind it.

    Every rank adds to the change of its layer, and every layer to that of the hidden state; since Adam moves
    each number by the rate, the best rate falls with the square root of their count.
    """
    ranks = lora.rank * len(lora.layers)
    return LORA_SHARE * min(1.0, math.sqrt(LORA_RANKS / ranks))


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
