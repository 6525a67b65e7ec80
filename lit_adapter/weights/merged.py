"""A base whose weights hold what an adapter trained, except for its prefixes.

Norms take the place of the base's. V2's ``s * (W x + b)`` is again a linear layer, with weight ``diag(s) W``
and bias ``s * b``, and so is LoRA's, with weight ``W + scale * B A``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.families import nearest
from lit_adapter.model.layout import base_shapes
from lit_adapter.weights.huggingface import EMBEDDING, OUTPUT_LAYER, HuggingFaceSource
from lit_adapter.weights.source import Source

OUTPUT_BIAS = "lm_head.bias"
"""A tensor that no plain LLaMA has; adapters with ``head`` need it."""


class MergedSource(Source):
    """A base folder whose tensors are merged with an adapter's, in fp32.

    With V2 all linear layers get a bias; with its ``head`` the output layer is no longer tied.
    """

    format = "merged"

    def __init__(self, base: Path, adapter: Path, form: AdapterConfig, state: dict[str, Tensor]) -> None:
        self.base, self.adapter, self.form, self.state = HuggingFaceSource(base), adapter, form, state
        self.config = self.base.config
        if "linears" in form.parts:
            self.config = _with_biases(self.config, adapter)
        if form.head:
            self.config = replace(self.config, tie_embeddings=False)
        self.dtypes = dict.fromkeys(base_shapes(self.config), torch.float32)
        self.token_ids = self.base.token_ids
        self.generation = self.base.generation

    def tensor(self, name: str) -> Tensor:
        """Return a merged tensor, or `OUTPUT_BIAS`."""
        merged = self._merged(name)
        if not bool(torch.isfinite(merged).all()):
            raise UserError(f"{self.label(name)} is beyond the range of float32; train the adapter again")
        return merged

    def _own(self, name: str) -> Tensor:
        """Return the base's tensor; its output layer may be its embedding."""
        tied = name == OUTPUT_LAYER and self.base.config.tie_embeddings
        return self.base.tensor(EMBEDDING if tied else name).float()

    def _merged(self, name: str) -> Tensor:
        module, _, kind = name.removeprefix("model.").rpartition(".")
        norm = self.state.get(f"{module}.adapter_weight")
        if norm is not None:
            return norm
        b = self.state.get(f"{module}.lora_b")
        if b is not None and kind == "weight":
            update = b.double() @ self.state[f"{module}.lora_a"].double()
            return (self._own(name).double() + self.form.lora.scale * update).float()
        scale = self.state.get(f"{module}.adapter_scale")
        if scale is None:
            return self._own(name)
        if kind == "weight":
            return self._own(name) * scale[:, None]
        own = self._own(name) if name in self.base.dtypes else torch.zeros_like(scale)
        return scale * (own + self.state[f"{module}.adapter_bias"])

    @property
    def other_family(self) -> list[str]:
        """What to tell the user of a model that is not of the base's family; nothing if it is."""
        own = self.config.family
        return [] if own == self.base.config.family else [f"written as {own}, which has all of V2's biases"]

    def label(self, name: str) -> str:
        """Return the adapter's file and the name."""
        return f"{self.adapter}: merged tensor {name}"

    def write_tokenizer(self, out: Path) -> None:
        """Copy the base's tokenizer."""
        self.base.write_tokenizer(out)


def _with_biases(config: LlamaConfig, path: Path) -> LlamaConfig:
    """Return a base's configuration with a bias on every layer, under the nearest family that has them."""
    try:
        return nearest(replace(config, attention_bias=True, qkv_bias=False, mlp_bias=True))
    except UserError as error:
        raise UserError(
            f"{path}: V2's biases cannot be merged into a {config.family} model: {error}; "
            "train one with --adapter.norms true or --adapter.lora.rank instead"
        ) from None
