"""What a user would pick instead: PEFT's adapters on transformers' LLaMA, as their users run them."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.methods import Part, Steps, padded_part, padded_steps
from benchmarks.models import Base, causal_model
from benchmarks.workload import Workload

PROMPT_LENGTH = 10


def adapted(causal: Any, kind: str, layers: int, *, autocast_adapter: bool = False) -> Any:
    """Attach PEFT's ``adaption-prompt`` or ``lora`` (r 8 on q, v) to a LlamaForCausalLM and return it.

    Args:
        causal: transformers' model.
        kind: ``adaption-prompt`` or ``lora``.
        layers: how many of the top layers an adaption prompt goes into; LoRA goes into all.
        autocast_adapter: let PEFT convert the adapter to fp32.
    """
    from peft import AdaptionPromptConfig, LoraConfig, PeftConfig, get_peft_model

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    config: PeftConfig = AdaptionPromptConfig(
        adapter_len=PROMPT_LENGTH, adapter_layers=layers, task_type="CAUSAL_LM"
    )
    if kind == "lora":
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    wrapped: Any = get_peft_model(causal, config, autocast_adapter_dtype=autocast_adapter)
    return wrapped.base_model.model.eval()  # no part of it has dropout


class Shell:
    """One of PEFT's adapters on the shared weights, optionally with liger-kernel or torch.compile."""

    def __init__(self, base: Base, kind: str, seed: int, *, liger: bool, compiled: bool) -> None:
        self.kind, self.patches = kind, {}
        torch.manual_seed(seed)
        causal = causal_model(base)
        if liger:
            self.patches = _with_liger(causal)
        self.causal = adapted(causal, kind, base.adapted)
        self.parameters: list[nn.Parameter] = [p for p in self.causal.parameters() if p.requires_grad]
        if compiled:
            for layer in self.causal.model.layers:
                layer.compile(dynamic=True)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Keep liger's module-wide patches away from the other methods: they hold inside the block only."""
        module = importlib.import_module("transformers.models.llama.modeling_llama")
        original = {name: getattr(module, name) for name in self.patches}
        try:
            for name, value in self.patches.items():
                setattr(module, name, value)
            yield
        finally:
            for name, value in original.items():
                setattr(module, name, value)


def _with_liger(causal: Any) -> dict[str, Any]:
    """Patch a model with liger-kernel; undo and return what it changed for all models."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    module = importlib.import_module("transformers.models.llama.modeling_llama")
    before = dict(vars(module))
    apply_liger_kernel_to_llama(model=causal)
    changed = {name: value for name, value in vars(module).items() if before.get(name) is not value}
    for name in changed:
        setattr(module, name, before[name])
    return changed


class Rival:
    """A shell trained on padded batches."""

    def __init__(self, base: Base, work: Workload, shell: Shell, size: int, *, grouped: bool) -> None:
        self.base, self.work, self.shell, self.size, self.grouped = base, work, shell, size, grouped
        self.parameters = shell.parameters

    def steps(self, records: list[NDArray[np.int64]]) -> Steps:
        """Pad each micro-batch to its longest record."""
        length = 0 if self.shell.kind == "lora" else PROMPT_LENGTH
        for step in padded_steps(self.work, records, self.size, grouped=self.grouped):
            yield [padded_part(self.base, self.work.encoded, part, length) for part in step]

    def loss(self, part: Part) -> Tensor:
        """Return the loss that the model itself computes, as trainers call it."""
        batch = part.data
        with self.shell.active():
            return self.shell.causal(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                labels=batch.labels,
                use_cache=False,
                num_items_in_batch=1,
            ).loss
