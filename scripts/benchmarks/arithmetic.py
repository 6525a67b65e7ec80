"""The floating-point operations that a training step really does.

A multiplication with its addition counts two. A frozen layer costs 2 per weight and token forward and 2
backward (no weight gradient). Letters as in `lit_adapter.model`: C width, H query and G key/value heads,
D head size, K prompt length, N layers, L adapted layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from lit_adapter.model.config import LlamaConfig


@dataclass(frozen=True)
class Work:
    """What a forward and backward pass touches."""

    tokens: int
    """Positions that go through the layers."""
    pairs: int
    """Pairs of a query and a key that it attends to, over those positions."""
    last_tokens: int
    """Positions that need the last layer's queries, output projection and MLP, and the output layer."""
    last_pairs: int
    """Pairs of those positions."""


def step_operations(config: LlamaConfig, work: Work, adapted: int, prompt_length: int) -> int:
    """Return the operations of a forward and a backward pass through a frozen model with an adapter.

    Below the first adapted layer nothing is differentiated, and in that layer only what follows its adapter.
    LoRA's own products, less than 1 % of the rest, are left out.

    Args:
        config: the model's sizes.
        work: the positions and pairs that are computed.
        adapted: how many top layers carry something trained (L).
        prompt_length: rows of the gated prefix in each of them (K); 0 for LoRA.
    """
    C, width = config.n_embd, config.n_head * config.head_dim
    query = output = C * width
    key_value, mlp = 2 * C * config.n_kv_head * config.head_dim, 3 * C * config.n_hidden
    first, total = config.n_layer - adapted, 0
    for layer in range(config.n_layer):
        last = layer == config.n_layer - 1
        queries, pairs = (work.last_tokens, work.last_pairs) if last else (work.tokens, work.pairs)
        into = 2 * (query * queries + key_value * work.tokens)
        attention = 4 * width * pairs
        out_of = 2 * (output + mlp) * queries
        inner = layer > first or (layer == first and not prompt_length)  # attention is differentiated
        total += into * (2 if layer > first else 1)
        total += attention * (3 if inner else 1)
        total += out_of * (2 if layer >= first else 1)
        if layer >= first and prompt_length:
            total += 3 * 4 * width * prompt_length * queries + 2 * 2 * key_value * prompt_length
    return total + 4 * C * config.vocab_size * work.last_tokens
