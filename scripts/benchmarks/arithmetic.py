"""The floating-point operations of a training step, counted where they are really done.

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
    """Pairs of a query and a key that it sees, over those positions."""
    last_tokens: int
    """Positions that need the last layer's queries, output projection and MLP."""
    last_pairs: int
    """Pairs of those positions."""
    head_tokens: int
    """Positions that meet the output head."""


@dataclass(frozen=True)
class Weights:
    """Weights of one layer, by what they serve."""

    q: int
    kv: int
    o: int
    mlp: int

    @classmethod
    def of(cls, config: LlamaConfig) -> Weights:
        """Return the sizes of a model's layers."""
        C, D = config.n_embd, config.head_dim
        return cls(
            C * config.n_head * D,
            2 * C * config.n_kv_head * D,
            C * config.n_head * D,
            3 * C * config.n_hidden,
        )


def step_operations(config: LlamaConfig, work: Work, adapted: int, prompt_length: int) -> int:
    """Return the operations of a forward and a backward pass through a frozen model with an adapter.

    Below the first adapted layer nothing is differentiated, and in it only what follows its adapter. LoRA's
    own products, below 1 % of the rest, are left out.

    Args:
        config: the model's sizes.
        work: what is computed.
        adapted: how many top layers carry something trained (L).
        prompt_length: rows of the gated prefix in each of them (K); 0 for LoRA.
    """
    weights, width = Weights.of(config), config.n_head * config.head_dim
    first, total = config.n_layer - adapted, 0
    for layer in range(config.n_layer):
        last = layer == config.n_layer - 1
        queries, pairs = (work.last_tokens, work.last_pairs) if last else (work.tokens, work.pairs)
        into = 2 * (weights.q * queries + weights.kv * work.tokens)
        attention = 4 * width * pairs
        out_of = 2 * (weights.o + weights.mlp) * queries
        inner = layer > first or (layer == first and not prompt_length)  # attention is differentiated
        total += into * (2 if layer > first else 1)
        total += attention * (3 if inner else 1)
        total += out_of * (2 if layer >= first else 1)
        if layer >= first and prompt_length:
            total += 3 * 4 * width * prompt_length * queries + 2 * 2 * weights.kv * prompt_length
    return total + 4 * config.n_embd * config.vocab_size * work.head_tokens
