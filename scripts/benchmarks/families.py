"""The two families of adapters that scripts/measure_peers.py compares: our adapters and PEFT's."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.methods import padded_batch
from benchmarks.rivals import adapted
from lit_adapter.config import OptimConfig
from lit_adapter.data.packing import Packer
from lit_adapter.errors import UserError
from lit_adapter.model.adapter import adapter_parameters, attach
from lit_adapter.model.attention import PackedRow, SegmentView
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.loss import target_loss
from lit_adapter.weights.load import load_base


@dataclass(frozen=True)
class Method:
    """An adapter and its optimizer settings, trained once for each learning rate."""

    name: str
    rates: tuple[float, ...]
    quick: float | None = None
    """The learning rate of the quick subset; None leaves the method out of it."""
    family: str = "ours"
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """For our family only."""
    optim: OptimConfig = field(default_factory=OptimConfig)


Run = tuple[Method, float]


def all_methods() -> dict[str, Method]:
    """Return the comparison by name: our default, its variants, and PEFT's two adapters."""
    rate, peft = OptimConfig().peak_lr, OptimConfig(weight_decay=0.0)
    paper = AdapterConfig(prompt_length=10, gate="tanh", norms=False, prompt_init_std=1.0)
    found = [
        Method("ours", (1e-2, 2e-2, 3e-2), quick=rate),
        Method("ours-paper", (9e-3, 2e-2, 3e-2), adapter=paper),
        Method("ours-k16", (1e-2, 2e-2, 3e-2), adapter=AdapterConfig(prompt_length=16)),
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
    """This package: packed rows with shared preambles."""

    def __init__(self, base: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.model = load_base(base, device=device, dtype=dtype)

    def prepare(self, packer: Packer, records: NDArray[np.int64]) -> Batch:
        """Pack ``records`` and prepare their attention, once for all runs."""
        parts = []
        for members in packer.assign(records):
            row = packer.row(members)
            row = replace(row, **{name: x.to(self.device) for name, x in vars(row).items()})
            parts.append((row, SegmentView(row, self.model.rotation(row.position[None]))))
        return Batch(parts, sum(len(row.target_id) for row, _ in parts))

    def start(self, method: Method, seed: int) -> list[nn.Parameter]:
        """Attach new prefixes in place of the last run's and return their parameters."""
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
        """Pad ``records``, grouped by length, at most a packed row's tokens in a micro-batch."""
        length, groups = packer.encoded.length, [[]]  # type: tuple[NDArray[np.int64], list[list[int]]]
        for record in records[np.argsort(-length[records], kind="stable")].tolist():
            if groups[-1] and length[groups[-1][0]] * (len(groups[-1]) + 1) > packer.row_tokens:
                groups.append([])
            groups[-1].append(record)
        parts = [self._padded(packer, group) for group in groups]
        return Batch(parts, sum(len(target_id) for _, _, target_id in parts))

    def _padded(self, packer: Packer, records: list[int]) -> tuple[Tensor, ...]:
        """Return right-padded ids ``[B, T]``, the flat positions that predict a target, and the targets."""
        padded = padded_batch(packer.encoded, np.array(records), torch.device("cpu"))
        # Found here, so that a step need not wait for the device to count them.
        next_label = padded.labels.roll(-1, 1).flatten()  # no record's first token is a target
        place = (next_label != -100).nonzero()[:, 0]
        return tuple(part.to(self.device) for part in (padded.ids, place, next_label[place]))

    def start(self, method: Method, seed: int) -> list[nn.Parameter]:
        """Reset the adapter to its initial values and return its parameters."""
        with torch.no_grad():
            for parameter, initial in zip(self.trained, self.initial, strict=True):
                parameter.copy_(initial)
        return self.trained

    def loss(self, part: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Return the summed cross-entropy of a padded batch."""
        ids, place, target_id = part
        # No padding mask: under the causal mask, no target sees the padding on its right.
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden = self.causal.model(input_ids=ids, use_cache=False).last_hidden_state
            logits = self.causal.lm_head(hidden.flatten(0, 1).index_select(0, place))
        return F.cross_entropy(logits.float(), target_id, reduction="sum")


def _peft_model(kind: str, base: Path, device: torch.device, dtype: torch.dtype) -> Any:
    try:
        import peft  # noqa: F401
        import transformers
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
    return adapted(model.to(device), kind, model.config.num_hidden_layers, autocast_adapter=True)
