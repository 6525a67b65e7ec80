"""The adapted LLaMA written out head by head in fp64, sharing nothing with the package's model."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_adapter.model.config import LlamaConfig


def reference_logits(
    config: LlamaConfig,
    base: dict[str, Tensor],
    adapter: dict[str, Tensor],
    form: str,
    ids: Tensor,
    query: str = "rotated",
) -> Tensor:
    """Return logits ``[T, V]`` of one text ``ids [T]``, rope of kind default.

    ``form`` is the gate form; ``query`` says which queries attend to the prompts. ``adapter`` may hold V2's
    tensors too, ``s * (W x + b)`` for linears, norm weights in place of the base's, and LoRA's,
    ``W x + b + 2 B A x``.
    """
    base = {name: tensor.double() for name, tensor in base.items() if not _is_trained(name)}
    adapter = {name: tensor.double() for name, tensor in adapter.items()}
    base |= {name.replace(".adapter_weight", ".weight"): tensor for name, tensor in adapter.items()}
    x = base["embed_tokens.weight"][ids]
    for index in range(config.n_layer):
        layer = f"layers.{index}"
        normed = _norm(x, base[f"{layer}.input_layernorm.weight"], config.norm_eps)
        x = x + _attention(config, base, adapter, (form, query), index, normed)
        normed = _norm(x, base[f"{layer}.post_attention_layernorm.weight"], config.norm_eps)
        gate, up = (_linear(base, f"{layer}.mlp.{part}_proj", normed) for part in ("gate", "up"))
        x = x + _linear(base, f"{layer}.mlp.down_proj", gate / (1 + (-gate).exp()) * up)
    return _linear(base, "lm_head", _norm(x, base["norm.weight"], config.norm_eps))


def _is_trained(name: str) -> bool:
    return ".adapter_" in name or ".lora_" in name


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / ((x * x).mean(-1, keepdim=True) + eps) ** 0.5 * weight


def _head_norm(config: LlamaConfig, state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return _norm(x, state[f"{name}.weight"], config.norm_eps) if f"{name}.weight" in state else x


def _linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    if f"{name}.lora_a" in state:  # scale: 2, the default
        y = y + 2 * (x @ state[f"{name}.lora_a"].T) @ state[f"{name}.lora_b"].T
    y = y + state[f"{name}.bias"] if f"{name}.bias" in state else y
    if f"{name}.adapter_scale" in state:
        return state[f"{name}.adapter_scale"] * (y + state[f"{name}.adapter_bias"])
    return y


def _turned(config: LlamaConfig, x: Tensor) -> Tensor:
    """Rotate one head ``[T, D]``: number i and number i + D/2 are one complex number."""
    half = x.shape[-1] // 2
    exponent = torch.arange(half, dtype=torch.float32) * 2 / x.shape[-1]
    frequency = (1.0 / config.rope.theta**exponent).double()  # a model keeps them in fp32
    angle = torch.arange(len(x))[:, None] * frequency
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


def _attention(
    config: LlamaConfig,
    base: dict[str, Tensor],
    adapter: dict[str, Tensor],
    form: tuple[str, str],
    index: int,
    x: Tensor,
) -> Tensor:
    stem, D = f"layers.{index}.self_attn", config.head_dim
    project = {part: _linear(base, f"{stem}.{part}_proj", x) for part in "qkv"}
    prompt = adapter.get(f"{stem}.prefix.prompt")
    hidden = torch.ones(len(x), len(x)).triu(1).bool()
    if index in config.windowed_layers:
        hidden |= torch.ones(len(x), len(x)).tril(-(config.window or 0)).bool()
    heads = []
    for head in range(config.n_head):
        shared = head * config.n_kv_head // config.n_head
        own, group = slice(head * D, head * D + D), slice(shared * D, shared * D + D)
        plain = _head_norm(config, base, f"{stem}.q_norm", project["q"][:, own])
        k = _head_norm(config, base, f"{stem}.k_norm", project["k"][:, group])
        q, k = (plain, k) if index in config.unrotated_layers else (_turned(config, x) for x in (plain, k))
        score = (q @ k.T / D**0.5).masked_fill(hidden, -torch.inf)
        y = score.softmax(-1) @ project["v"][:, group]
        if prompt is not None:
            pk, pv = (_linear(base, f"{stem}.{part}_proj", prompt)[:, group] for part in "kv")
            pk = _head_norm(config, base, f"{stem}.k_norm", pk)
            asked = q if form[1] == "rotated" else plain
            gate = adapter[f"{stem}.prefix.gate"]
            y = y + (asked @ pk.T / D**0.5).softmax(-1) @ (_opening(gate, form[0], head, own, len(pk)) * pv)
        heads.append(y)
    return _linear(base, f"{stem}.o_proj", torch.cat(heads, dim=-1))


def _opening(gate: Tensor, form: str, head: int, channels: slice, K: int) -> Tensor:
    """c(g) for one head, for values ``[K, D]``."""
    return {
        "tanh": lambda: gate[head].tanh(),
        "identity": lambda: gate[head],
        "layer": lambda: gate[0],
        "channel": lambda: gate[channels],
        "token": lambda: gate[head * K : head * K + K, None],
    }[form]()
