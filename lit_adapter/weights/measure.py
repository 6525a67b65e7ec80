"""The largest difference in logits between an adapter and another form of it, on a fixed prompt."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lit_adapter.model.adapter import attach, load_adapter_state, plain_base
from lit_adapter.model.attention import CausalView
from lit_adapter.model.layout import base_shapes
from lit_adapter.model.llama import Llama, empty_llama
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import resolve_template
from lit_adapter.weights.load import load_base
from lit_adapter.weights.plain import PlainAdapter
from lit_adapter.weights.source import Source

INSTRUCTION = "Give three tips for staying healthy."


def fixed_prompt(base: Path) -> Tensor:
    """Return the token ids ``[1, T]`` of one Alpaca prompt."""
    tokenizer = load_tokenizer(base)
    return torch.tensor([resolve_template("alpaca", tokenizer).encode_prompt(tokenizer, INSTRUCTION)])


@torch.inference_mode()
def logits(base: Path, ids: Tensor, adapter: PlainAdapter | None) -> Tensor:
    """Return logits ``[1, T, V]`` of the base, with an adapter if one is given, in fp32 on the CPU."""
    return _logits(_load(base, adapter), ids)


@torch.inference_mode()
def source_logits(source: Source, ids: Tensor) -> Tensor:
    """Return logits ``[1, T, V]`` of a checkpoint's tensors, in fp32 on the CPU."""
    model = empty_llama(source.config).eval()
    state = {name.removeprefix("model."): source.tensor(name).float() for name in base_shapes(source.config)}
    tied = {"lm_head.weight": state["embed_tokens.weight"]} if source.config.tie_embeddings else {}
    model.load_state_dict(state | tied, strict=True, assign=True)
    return _logits(model, ids)


def _load(base: Path, adapter: PlainAdapter | None) -> Llama:
    model = load_base(base, device="cpu", dtype=torch.float32).eval()
    if adapter is not None:
        attach(model, adapter.config.without_dropout())
        load_adapter_state(model, adapter.state)
    return model


def _logits(model: Llama, ids: Tensor) -> Tensor:
    position = torch.arange(ids.shape[1])[None]
    return model.logits(model(ids, CausalView(model.rotation(position))))


def compared(adapted: Tensor, written: Tensor, what: str, remark: str = "") -> str:
    """Say how far the logits of what was ``written`` are from the adapter's, both ``[1, T, V]``."""
    return (
        f"largest logit difference {float((adapted - written).abs().max()):.3g} between adapter and {what} "
        f"({adapted.shape[1]} prompt tokens{remark}; logits up to {float(adapted.abs().max()):.3g})"
    )


@torch.inference_mode()
def difference(base: Path, source: PlainAdapter, target: PlainAdapter) -> str:
    """Say how far the logits of two adapters are apart, and how far the first is from the base."""
    ids, model = fixed_prompt(base), _load(base, source)
    one, other = _logits(model, ids), logits(base, ids, target)
    with plain_base(model):
        plain = _logits(model, ids)
    worst, effect = float((one - other).abs().max()), float((one - plain).abs().max())
    return (
        f"largest difference {worst:.3g} between source and target form ({ids.shape[1]} prompt tokens, fp32; "
        f"the adapter itself moves them by up to {effect:.3g})"
    )
