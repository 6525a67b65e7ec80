"""Merge a base and an adapter without prompts into one plain Hugging Face model of the base's family.

Norms take the place of the base's. V2's ``s * (W x + b)`` is again a linear layer, with weight ``diag(s) W``
and bias ``s * b``, and so is LoRA's, with weight ``W + scale * B A``. Where the base's family has no such
biases, the nearest one that has all the rest is written. A gated prefix cannot be merged: it has a second
softmax, which no weights of a plain model can express.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.families import nearest
from lit_adapter.model.layout import base_shapes
from lit_adapter.weights.adapter_file import AdapterInfo, check_base, read_adapter
from lit_adapter.weights.base_content import check_content
from lit_adapter.weights.base_search import find_base
from lit_adapter.weights.convert import write_base
from lit_adapter.weights.huggingface import HuggingFaceSource
from lit_adapter.weights.measure import fixed_prompt, logits
from lit_adapter.weights.output_folder import check_output, sweep_leftovers
from lit_adapter.weights.plain import PlainAdapter
from lit_adapter.weights.source import Source


def merge(
    adapter: Path,
    out: Path,
    *,
    base: Path | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Write the merged model as a base folder, and say how far its logits are from the adapter's.

    The adapter's ``base`` is by default the one that it names. The merged weights are
    rounded to ``dtype``: float32, bfloat16 or float16. ``overwrite`` replaces a base folder that is already
    there, and ``progress`` is called with (bytes written, bytes in all).

    Raises:
        UserError: an adapter that cannot be merged, another base, or an output that must not be replaced.
    """
    info, state = read_adapter(adapter)
    _refuse_unmergeable(info, adapter)
    folder = find_base(info.base, adapter) if base is None else base
    check_base(info, folder, adapter)
    check_content(folder, everything=True)  # all of it is read anyway, and the result is kept
    out = out.absolute()
    sweep_leftovers(out)
    for source in (adapter, folder):
        check_output(out, source, overwrite=overwrite)
    origin = {"format": "merged", "base": info.base.name, "adapter": adapter.name}
    ids = fixed_prompt(folder)
    before = logits(folder, ids, PlainAdapter(info.adapter, state))
    _check_finite(before, f"{adapter}: its logits are NaN or infinite; train it again")
    differences: list[float] = []

    def compare(written: Path) -> None:
        after = logits(written, ids, None)
        _check_finite(after, f"{out}: its logits are NaN or infinite in {dtype}; use --dtype float32")
        differences.append(float((before - after).abs().max()))

    merged = _MergedSource(folder, adapter, info.adapter, state)
    write_base(merged, folder, out, dtype, origin, progress=progress, check=compare)
    family = merged.config.family
    written = f"written as {family}, which has all of V2's biases; " if family != info.model.family else ""
    return written + (
        f"largest logit difference {differences[0]:.3g} between adapter and merged model "
        f"({ids.shape[1]} prompt tokens; logits up to {float(before.abs().max()):.3g})"
    )


def _check_finite(found: Tensor, message: str) -> None:
    if not bool(torch.isfinite(found).all()):
        raise UserError(message)


def _refuse_unmergeable(info: AdapterInfo, path: Path) -> None:
    if info.adapter.prompt_length:
        raise UserError(
            f"{path}: has prompts, whose attention has a softmax of its own that a plain LLaMA lacks, "
            "so it cannot be merged; use it as it is (--adapter), or train one with --adapter.version v2, "
            "--adapter.norms true or --adapter.lora.rank, and --adapter.prompt_length 0"
        )
    if info.adapter.head:
        raise UserError(
            f"{path}: adapts the output layer, which has no bias in a plain LLaMA, so it cannot be merged; "
            "train one with --adapter.head false"
        )


def _with_biases(config: LlamaConfig, path: Path) -> LlamaConfig:
    """Return a base's configuration with a bias on every layer, under the nearest family that has them."""
    try:
        return nearest(replace(config, attention_bias=True, qkv_bias=False, mlp_bias=True))
    except UserError as error:
        raise UserError(
            f"{path}: V2's biases cannot be merged into a {config.family} model: {error}; "
            "train one with --adapter.norms true or --adapter.lora.rank instead"
        ) from None


class _MergedSource(Source):
    """A base folder whose tensors are merged with an adapter's, in fp32; ``biases``: all layers get one."""

    format = "merged"

    def __init__(self, base: Path, adapter: Path, form: AdapterConfig, state: dict[str, Tensor]) -> None:
        self.base, self.adapter, self.form, self.state = HuggingFaceSource(base), adapter, form, state
        self.config = self.base.config
        if "linears" in form.parts:
            self.config = _with_biases(self.config, adapter)
        self.dtypes = dict.fromkeys(base_shapes(self.config), torch.float32)
        self.token_ids = self.base.token_ids
        self.generation = self.base.generation

    def tensor(self, name: str) -> Tensor:
        merged = self._merged(name)
        if not bool(torch.isfinite(merged).all()):
            raise UserError(f"{self.label(name)} is beyond the range of float32; train the adapter again")
        return merged

    def _merged(self, name: str) -> Tensor:
        module, _, kind = name.removeprefix("model.").rpartition(".")
        norm = self.state.get(f"{module}.adapter_weight")
        if norm is not None:
            return norm
        b = self.state.get(f"{module}.lora_b")
        if b is not None and kind == "weight":
            update = b.double() @ self.state[f"{module}.lora_a"].double()
            return (self.base.tensor(name).double() + self.form.lora.scale * update).float()
        scale = self.state.get(f"{module}.adapter_scale")
        if scale is None:
            return self.base.tensor(name).float()
        if kind == "weight":
            return self.base.tensor(name).float() * scale[:, None]
        own = self.base.tensor(name).float() if name in self.base.dtypes else torch.zeros_like(scale)
        return scale * (own + self.state[f"{module}.adapter_bias"])

    def label(self, name: str) -> str:
        return f"{self.adapter}: merged tensor {name}"

    def write_tokenizer(self, out: Path) -> None:
        self.base.write_tokenizer(out)
