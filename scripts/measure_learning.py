"""Compare what adapters learn from the same batches: ours, PEFT's AdaptionPrompt and PEFT's LoRA.

    python scripts/measure_learning.py --data alpaca_libre.json --json learning.json

Every run sees the same token ids in the same optimizer steps, with the same schedule, clipping and
token-weighted loss; only the adapter and its optimizer settings differ. PEFT's adapters run on
transformers' LLaMA with padded batches and PyTorch's loss, so that only the data is shared with ours.
Untrained adapters add nothing, so all must then show the same held-out loss on the same targets; the
script prints whether they do. Losses are sums over answer tokens divided by their number, in nats.
"""

from __future__ import annotations

import gc
import math
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lit_adapter import files
from lit_adapter.command import command_parser, parse, run
from lit_adapter.config import OptimConfig
from lit_adapter.data.encode import encode_records
from lit_adapter.data.packing import Packer, TrainingSteps, shared_heads
from lit_adapter.data.records import read_records, split
from lit_adapter.device import DTYPES, choose_device
from lit_adapter.errors import UserError, nearest
from lit_adapter.model.adapter import adapter_parameters, attach
from lit_adapter.model.attention import PackedRow, SegmentView
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.loss import target_loss
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import resolve_template
from lit_adapter.training.schedule import learning_rate, total_steps
from lit_adapter.weights.load import load_base

MAX_LENGTH = 512
SAME_BASE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest difference in held-out loss between untrained implementations, by precision of the base."""
MARGINS = {"peft-adaption-prompt": 0.0, "peft-lora": 0.03}
"""By how much our default may end above each."""


@dataclass(frozen=True)
class Method:
    """An adapter and its optimizer's settings, run once for each learning rate."""

    name: str
    rates: tuple[float, ...]
    quick: float | None = None
    """The one rate of the quick subset; None leaves the method out of it."""
    family: str = "ours"
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Of our family only."""
    optim: OptimConfig = field(default_factory=OptimConfig)


Run = tuple[Method, float]


def all_methods() -> dict[str, Method]:
    """Return the comparison by name: our default, its variants, and PEFT's two adapters."""
    rate, peft = OptimConfig().peak_lr, OptimConfig(weight_decay=0.0)
    found = [
        Method("ours", (1e-2, 2e-2, 3e-2), quick=rate),
        Method("ours-paper", (9e-3, 2e-2, 3e-2), adapter=AdapterConfig(prompt_init_std=1.0)),
        Method("ours-k20", (1e-2, 2e-2, 3e-2), adapter=AdapterConfig(prompt_length=20)),
        Method("ours-identity-gate", (rate,), adapter=AdapterConfig(gate="identity")),
        Method("ours-no-decay", (rate,), optim=OptimConfig(weight_decay=0.0)),
        Method("ours-beta2-0.999", (rate,), optim=OptimConfig(betas=(0.9, 0.999))),
        Method("peft-adaption-prompt", (9e-3, 2e-2, 3e-2), 3e-2, "adaption-prompt", optim=peft),
        Method("peft-lora", (5e-4, 1e-3, 2e-3), 2e-3, "lora", optim=peft),
    ]
    for std in (0.02, 0.05, 0.1, 0.2):
        if std != AdapterConfig().prompt_init_std:
            found.append(Method(f"ours-std-{std:g}", (rate,), adapter=AdapterConfig(prompt_init_std=std)))
    return {method.name: method for method in found}


@dataclass
class Batch:
    """The records of one optimizer step, in the micro-batches of one family."""

    parts: list[Any]
    n_targets: int


class Ours:
    """This package: packed rows with shared starts."""

    def __init__(self, base: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.model = load_base(base, device=device, dtype=dtype)

    def prepare(self, packer: Packer, records: NDArray[np.int64]) -> Batch:
        """Pack ``records`` and plan their attention, once for all runs."""
        parts = []
        for members in packer.assign(records):
            row = packer.row(members)
            row = replace(row, **{item.name: getattr(row, item.name).to(self.device) for item in fields(row)})
            parts.append((row, SegmentView(row, self.model.rotation(row.position[None]))))
        return Batch(parts, sum(len(row.target_id) for row, _ in parts))

    def start(self, method: Method, seed: int) -> list[nn.Parameter]:
        """Attach new prefixes in place of the last run's; return what is trained."""
        attach(self.model, method.adapter, seed)
        return [parameter for _, parameter in adapter_parameters(self.model)]

    def loss(self, part: tuple[PackedRow, SegmentView]) -> Tensor:
        """Return the summed cross-entropy of a packed row."""
        row, view = part
        hidden = self.model(row.ids[None], view, row.target_index)[0]
        return target_loss(hidden, self.model.lm_head.weight, row.target_id)


class Peft:
    """A PEFT adapter on transformers' LLaMA: padded batches, PyTorch's cross-entropy."""

    def __init__(self, kind: str, base: Path, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = device, dtype
        torch.manual_seed(seed)
        self.causal = _peft_model(kind, base, device, dtype)
        self.trained = [parameter for parameter in self.causal.parameters() if parameter.requires_grad]
        for parameter in self.trained:
            parameter.data = parameter.data.float()
        self.initial = [parameter.detach().clone() for parameter in self.trained]

    def prepare(self, packer: Packer, records: NDArray[np.int64]) -> Batch:
        """Pad ``records``, similar lengths together, at most a packed row's tokens in one part."""
        length, groups = packer.encoded.length, [[]]  # type: tuple[NDArray[np.int64], list[list[int]]]
        for record in records[np.argsort(-length[records], kind="stable")].tolist():
            if groups[-1] and length[groups[-1][0]] * (len(groups[-1]) + 1) > packer.row_tokens:
                groups.append([])
            groups[-1].append(record)
        parts = [self._padded(packer, group) for group in groups]
        return Batch(parts, sum(len(target_id) for _, _, target_id in parts))

    def _padded(self, packer: Packer, records: list[int]) -> tuple[Tensor, ...]:
        """Return ids padded on the right ``[B, T]``, flat places that predict a target, and the targets."""
        shape = len(records), int(packer.encoded.length[records].max())
        ids, labels = np.zeros(shape, np.int64), np.full(shape, -100)
        for line, record in enumerate(records):
            tokens, first = packer.encoded.record(record), int(packer.encoded.n_prompt[record])
            ids[line, : len(tokens)] = tokens
            labels[line, first : len(tokens)] = tokens[first:]
        # Found here, so that a step need not ask the device how many targets there are.
        next_label = np.roll(labels, -1, axis=1).reshape(-1)  # no record's first token is a target
        place = np.flatnonzero(next_label != -100)
        return tuple(torch.from_numpy(part).to(self.device) for part in (ids, place, next_label[place]))

    def start(self, method: Method, seed: int) -> list[nn.Parameter]:
        """Put the adapter back to where it started; return what is trained."""
        with torch.no_grad():
            for parameter, initial in zip(self.trained, self.initial, strict=True):
                parameter.copy_(initial)
        return self.trained

    def loss(self, part: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Return the summed cross-entropy of a padded batch."""
        ids, place, target_id = part
        # No attention mask: under the causal one, nothing that counts sees what is padded on the right.
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden = self.causal.model(input_ids=ids, use_cache=False).last_hidden_state
            logits = self.causal.lm_head(hidden.flatten(0, 1).index_select(0, place))
        return F.cross_entropy(logits.float(), target_id, reduction="sum")


def _peft_model(kind: str, base: Path, device: torch.device, dtype: torch.dtype) -> Any:
    try:
        import transformers
        from peft import AdaptionPromptConfig, LoraConfig, PeftConfig, get_peft_model
    except ImportError as error:
        raise UserError(
            f"{error.name} cannot be imported, and the peft methods need it; "
            "run: pip install -e '.[test]', or choose others with --methods"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    model: Any = transformers.LlamaForCausalLM.from_pretrained(
        str(base), dtype=dtype, attn_implementation="sdpa", local_files_only=True
    )
    layers = model.config.num_hidden_layers
    config: PeftConfig = AdaptionPromptConfig(adapter_len=10, adapter_layers=layers, task_type="CAUSAL_LM")
    if kind == "lora":
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    wrapped: Any = get_peft_model(model.to(device), config)
    return wrapped.base_model.model.eval()  # there is no dropout anywhere to lose


Family = Ours | Peft


@dataclass
class Course:
    """The data of the comparison."""

    steps: TrainingSteps
    held_out: Packer
    n_steps: int
    """Optimizer steps of a run."""

    def batches(self, family: Family) -> tuple[list[Batch], list[Batch]]:
        """Return a family's training steps and held-out batches."""
        train = [family.prepare(self.steps.packer, self.steps.records(step)) for step in range(self.n_steps)]
        order, size = np.arange(len(self.held_out.encoded)), self.steps.batch_size
        held_out = [order[first : first + size] for first in range(0, len(order), size)]
        return train, [family.prepare(self.held_out, records) for records in held_out]


def read_course(options: Any, device: torch.device) -> Course:
    """Read, split and encode the records.

    Raises:
        UserError: unusable data or sizes.
    """
    tokenizer = load_tokenizer(Path(options.base))
    template = resolve_template("alpaca", tokenizer)
    sides = split(read_records(options.data), val_size=options.held_out, seed=options.seed)
    train, held_out = (encode_records(side, tokenizer, template, max_length=MAX_LENGTH) for side in sides)
    heads, row_tokens = shared_heads(train), 8192 if device.type == "cuda" else 2048
    packers = [Packer(side, heads, mask_prompt=True, row_tokens=row_tokens) for side in (train, held_out)]
    steps = TrainingSteps(packers[0], batch_size=options.batch, seed=options.seed)
    plan = OptimConfig(batch_size=options.batch, epochs=options.epochs, max_steps=options.max_steps)
    return Course(steps, packers[1], total_steps(plan, steps.steps_per_epoch))


def train(family: Family, parameters: list[nn.Parameter], optim: OptimConfig, batches: list[Batch]) -> None:
    """Train one adapter; nothing here waits for the device."""
    optimizer = torch.optim.AdamW(
        parameters, lr=optim.peak_lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    bound = optim.clip if optim.clip is not None else math.inf
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, len(batches))
        for part in batch.parts:
            (family.loss(part) / batch.n_targets).backward()
        nn.utils.clip_grad_norm_(parameters, bound)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def evaluate(family: Family, batches: list[Batch]) -> float:
    """Return the loss per answer token."""
    sums = torch.stack([family.loss(part) for batch in batches for part in batch.parts])
    return float(sums.double().sum()) / sum(batch.n_targets for batch in batches)


@dataclass
class Start:
    """What a family shows before training; the same in all families if the comparison is fair."""

    family: str
    held_out_loss: float
    train_targets: int
    held_out_targets: int


@dataclass
class Row:
    """One line of the table."""

    method: str
    lr: float
    trained: int
    held_out_loss: float | None
    """None where the run diverged."""
    seconds: float
    """Training and one evaluation; loading and laying out the data are not in it."""


@dataclass
class Report:
    """What has been measured so far."""

    about: dict[str, Any]
    starts: list[Start] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def add(self, result: Start | Row, n_runs: int, path: str | None) -> None:
        """Keep a result, say it on standard error, and write all of them to ``path``."""
        if isinstance(result, Start):
            self.starts.append(result)
            line = f"{result.family}, before training"
        else:
            self.rows.append(result)
            line = f"[{len(self.rows)}/{n_runs}] {result.method}, lr {result.lr:g}, {result.seconds:.1f} s"
        print(f"{line}: held-out loss {_shown(result.held_out_loss)}", file=sys.stderr, flush=True)
        if path is not None:
            files.write_json(Path(path), asdict(self))

    def table(self) -> str:
        """Return the results as Markdown, best first."""
        lines = ["| method | learning rate | trained parameters | held-out loss | seconds |"]
        lines.append("|---|---:|---:|---:|---:|")
        for row in sorted(self.rows, key=lambda row: _or_infinity(row.held_out_loss)):
            loss = _shown(row.held_out_loss)
            lines.append(f"| {row.method} | {row.lr:g} | {row.trained:,} | {loss} | {row.seconds:.1f} |")
        lines.append(f"| base, nothing trained | | 0 | {_shown(self.starts[0].held_out_loss)} | |")
        return "\n".join(lines)

    def verdicts(self) -> list[str]:
        """Compare our default with PEFT's adapters, each at its best learning rate."""
        best: dict[str, float] = {}
        for row in self.rows:
            best[row.method] = min(_or_infinity(row.held_out_loss), best.get(row.method, math.inf))
        lines = []
        for name, margin in MARGINS.items():
            if "ours" in best and name in best:
                above = best["ours"] - best[name]
                verdict = "ok" if above < margin else "not reached"
                lines.append(f"ours minus {name}: {above:+.4f} (wanted: below {margin:g}): {verdict}")
        return lines

    def fairness(self, tolerance: float) -> tuple[str, bool]:
        """Say whether all families start from the same loss on the same targets."""
        losses = [start.held_out_loss for start in self.starts]
        seen = ", ".join(f"{start.family} {start.held_out_loss:.6f}" for start in self.starts)
        if len(losses) == 1:
            return f"before training: {seen}; one family alone, nothing to compare", True
        counts = sorted({(start.train_targets, start.held_out_targets) for start in self.starts})
        spread = max(losses) - min(losses)
        fair = spread <= tolerance and len(counts) == 1
        targets = " and ".join(f"{n:,} training, {m:,} held-out targets" for n, m in counts)
        verdict = "ok" if fair else "FAILED, the runs cannot be compared"
        return (
            f"before training: {seen}; spread {spread:.1e} (at most {tolerance:g}); {targets}: {verdict}",
            fair,
        )


def _shown(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4f}"


def _or_infinity(loss: float | None) -> float:
    return math.inf if loss is None else loss


def measure(family: Family, runs: list[Run], course: Course, options: Any, add: Any) -> None:
    """Report a family's state before training, then the result of each of its runs."""
    batches, held_out = course.batches(family)
    family.start(runs[0][0], options.seed)
    targets = [sum(batch.n_targets for batch in side) for side in (batches, held_out)]
    add(Start(runs[0][0].family, evaluate(family, held_out), *targets))
    for method, rate in runs:
        begin = time.perf_counter()
        parameters = family.start(method, options.seed)
        train(family, parameters, replace(method.optim, lr=rate, batch_size=options.batch), batches)
        loss = evaluate(family, held_out)
        seconds = round(time.perf_counter() - begin, 2)
        trained = sum(parameter.numel() for parameter in parameters)
        add(Row(method.name, rate, trained, loss if math.isfinite(loss) else None, seconds))


def chosen_runs(names: list[str] | None, subset: str) -> list[Run]:
    """Return the runs that were asked for.

    Raises:
        UserError: a name that no method has, or nothing to run.
    """
    methods = all_methods()
    for name in names or []:
        if name not in methods:
            hint = nearest(name, list(methods)) or f"; expected {', '.join(methods)}"
            raise UserError(f"--methods: no method '{name}'{hint}")
    wanted = [methods[name] for name in names or methods]
    if subset == "all":
        return [(method, rate) for method in wanted for rate in method.rates]
    runs = [(method, method.quick) for method in wanted if method.quick is not None]
    if not runs:
        raise UserError("--methods names no method of the quick subset; leave out --subset quick")
    return runs


def read_options(argv: Sequence[str]) -> Any:
    """Return the command line's options."""
    parser = command_parser("scripts/measure_learning.py", "Compare adapters on the same batches.")
    parser.add_argument("--data", required=True, help="a file of records")
    parser.add_argument("--base", default="checkpoints/smollm2-135m", help="folder of the converted base")
    parser.add_argument("--held-out", type=int, default=250, help="records to hold out")
    parser.add_argument("--batch", type=int, default=32, help="records in an optimizer step")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, help="length of each run, whatever --epochs says")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these rows of the table")
    parser.add_argument("--subset", choices=["all", "quick"], default="all", help="quick: one rate a method")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=list(SAME_BASE), default="float32", help="of the frozen base")
    parser.add_argument("--seed", type=int, default=1337, help="of split, order and initial adapters")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, after every run")
    return parse(parser, argv)


def main(argv: Sequence[str]) -> int:
    """Run the comparison; the status is 1 if it was not a fair one."""
    options = read_options(argv)
    runs = chosen_runs(options.methods, options.subset)
    device, dtype, base = choose_device(options.device), DTYPES[options.dtype], Path(options.base)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    course = read_course(options, device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    about = {name: options[name] for name in ("held_out", "batch", "seed", "dtype")}
    about |= {"data": Path(options.data).name, "base": base.name, "steps": course.n_steps}
    report = Report(about | {"device": where, "torch": torch.__version__})
    for name in dict.fromkeys(method.family for method, _ in runs):
        family = (
            Ours(base, device, dtype) if name == "ours" else Peft(name, base, device, dtype, options.seed)
        )
        mine = [(method, rate) for method, rate in runs if method.family == name]
        measure(family, mine, course, options, lambda result: report.add(result, len(runs), options.json))
        del family
        gc.collect()  # so that the next family's base has its place on the device
    check, fair = report.fairness(SAME_BASE[options.dtype])
    print(report.table(), "", *report.verdicts(), check, sep="\n")
    return 0 if fair else 1


if __name__ == "__main__":
    run(main)
