"""One decode step of a plain bf16 base on CUDA as five kernels a layer, without a copy of any weight.

Which of the two ways a step goes is decided here and nowhere else: `fusible` models take `FusedStep`,
all others `Llama.forward`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from lit_adapter.model.adapter import GatedPrefix
from lit_adapter.model.cache import KeyValueCache
from lit_adapter.model.llama import Block, Llama, RMSNorm

LEAST_CAPABILITY = (8, 0)
"""CUDA compute capability from which the matrix units know bf16."""


def fusible(model: Llama) -> bool:
    """Return whether the fused step computes this model: bf16, bias-free plain linear layers, on CUDA.

    Anything that computes differently (a quantised layer, a trained scale, another norm) is of another
    type, has a bias, or keeps its numbers in another precision.
    """
    weight, D = model.embed_tokens.weight, model.config.head_dim
    if weight.device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability(weight.device) < LEAST_CAPABILITY:
        return False
    prefixes = [block.self_attn.prefix for block in model.layers]
    return (
        D >= 16
        and D & (D - 1) == 0  # a kernel's tiles are powers of two
        and all(prefix is None or type(prefix) is GatedPrefix for prefix in prefixes)
        and all(_plain(linear) for block in model.layers for linear in _linears(block))
        and _plain(model.lm_head)
        and all(_plain(norm) for norm in (*_norms(model.layers), model.norm))
    )


def _linears(block: Block) -> list[Any]:
    attention, mlp = block.self_attn, block.mlp
    return [
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    ]


def _norms(blocks: Any) -> list[RMSNorm]:
    return [norm for block in blocks for norm in (block.input_layernorm, block.post_attention_layernorm)]


def _plain(module: nn.Module) -> bool:
    weight = module.weight
    return (
        type(module) in (nn.Linear, RMSNorm)
        and getattr(module, "bias", None) is None
        and isinstance(weight, Tensor)
        and weight.dtype == torch.bfloat16
        and weight.is_contiguous()
    )


class FusedStep:
    """Runs `fusible` models on a cache, one new token a slot.

    Args:
        model: see `fusible`; its weights are used in place.
        cache: keys and values, and the prefixes' own.
    """

    def __init__(self, model: Llama, cache: KeyValueCache) -> None:
        from lit_adapter.model.kernels import decode_attention, decode_products

        config, B = model.config, cache.n_slots
        self.model, self.cache = model, cache
        self.products, self.attend = decode_products, decode_attention.attend
        H, G, D = config.n_head, config.n_kv_head, config.head_dim
        new = model.embed_tokens.weight.new_empty
        self.x = new(B, config.n_embd)
        self.q, self.y = new(B, H, D), new(B, H, D)
        self.hidden = new(B, config.n_hidden)
        self.logits = new(B, config.vocab_size, dtype=torch.float32)
        self.shares = decode_attention.Shares(B, (H, G), D, cache.length, self.x.device)
        self.tile = decode_products.tile(B, self.x.device)
        self.prefix = [
            None if kv is None else (kv[0].contiguous(), kv[1].contiguous(), _strength(block, H, D))
            for kv, block in zip(cache.prefix, model.layers, strict=True)
        ]

    def __call__(self, token: Tensor, position: Tensor) -> Tensor:
        """Put every slot's newest token into the cache.

        Args:
            token: ``[B]``.
            position: of these tokens ``[B]``.

        Returns:
            Logits of the next token, fp32 ``[B, V]``; overwritten by the next call.
        """
        model, products, tile = self.model, self.products, self.tile
        torch.index_select(model.embed_tokens.weight, 0, token, out=self.x)
        rotation = model.rotation(position)
        for index, block in enumerate(model.layers):
            attention, mlp = block.self_attn, block.mlp
            cache = (self.cache.k[index], self.cache.v[index])
            weights = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
            norm = block.input_layernorm
            products.project(self.x, norm.weight, norm.eps, weights, rotation, position, self.q, cache, tile)
            self.attend(self.q, cache, position, self.prefix[index], self.shares, self.y)
            products.linear(self.y.flatten(1), attention.o_proj.weight, self.x, tile)
            norm = block.post_attention_layernorm
            products.gate_up(
                self.x, norm.weight, norm.eps, mlp.gate_proj.weight, mlp.up_proj.weight, self.hidden, tile
            )
            products.linear(self.hidden, mlp.down_proj.weight, self.x, tile)
        last = model.norm
        products.linear(self.x, model.lm_head.weight, self.logits, tile, norm=last.weight, eps=last.eps)
        return self.logits


def _strength(block: Block, H: int, D: int) -> Tensor:
    """Return c(g) of every channel, fp32 ``[H, D]``."""
    return block.self_attn.prefix.strength().expand(H, 1, D)[:, 0].contiguous()
