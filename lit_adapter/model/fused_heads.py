"""Head norms in the CUDA executors: queries and keys are normed and rotated in one pass.

A block keeps the output of its product, and computes both again in the backward pass, so it keeps no more
than without head norms.

Letters: T tokens of the row, M queries (T, or the targets alone), K prompt length, H query heads, G key/value
heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_adapter.model.attention import KeyValue
from lit_adapter.model.kernels import heads
from lit_adapter.model.llama import Attention, RMSNorm


@dataclass(frozen=True)
class HeadNorms:
    """The norms of one layer's queries and keys."""

    q_norm: RMSNorm
    k_norm: RMSNorm

    @classmethod
    def of(cls, attention: Attention) -> HeadNorms | None:
        """Return those of an attention layer; None if it has none."""
        q_norm, k_norm = attention.q_norm, attention.k_norm
        return None if q_norm is None or k_norm is None else cls(q_norm, k_norm)

    @property
    def weights(self) -> list[Tensor]:
        """The weights of the norms."""
        return [self.q_norm.used_weight, self.k_norm.used_weight]

    def turned(
        self, q: Tensor, kv: Tensor, query_rotation: KeyValue, rotation: KeyValue
    ) -> tuple[Tensor, Tensor]:
        """Return queries and keys, normed and rotated, beside the values.

        Args:
            q: ``[M, H D]``.
            kv: keys and values of the row, then of the prompt, ``[T + K, 2 G D]``; a prompt is not rotated.
            query_rotation: cosines and sines of the queries, fp32 ``[M, D/2]``.
            rotation: those of the row, fp32 ``[T, D/2]``.

        Returns:
            New tensors in the layout of ``q`` and of ``kv``.
        """
        width, new_q, new_kv = kv.shape[1] // 2, q.new_empty(q.shape), kv.new_empty(kv.shape)
        _norm(self.q_norm, q, query_rotation, new_q)
        _norm(self.k_norm, kv[:, :width], rotation, new_kv[:, :width])
        new_kv[:, width:] = kv[:, width:]
        return new_q, new_kv

    def norm_(self, q: Tensor, k: Tensor) -> None:
        """Norm queries and keys ``[T, heads * D]`` in place, without rotating them."""
        _norm(self.q_norm, q, None, q)
        _norm(self.k_norm, k, None, k)

    def backward_(self, dq: Tensor, dkv: Tensor, q: Tensor, kv: Tensor) -> list[Tensor | None]:
        """Turn the unrotated gradients of the outputs of `turned` into those of its inputs, in place.

        Returns:
            The gradients of `weights`, None where they are frozen.
        """
        width = kv.shape[1] // 2
        return [
            heads.norm_backward_(dq, q, self.q_norm.used_weight, self.q_norm.eps),
            self.keys_backward_(dkv[:, :width], kv[:, :width]),
        ]

    def keys_backward_(self, dk: Tensor, k: Tensor) -> Tensor | None:
        """Do the same for some keys ``[T, G D]`` alone."""
        return heads.norm_backward_(dk, k, self.k_norm.used_weight, self.k_norm.eps)


def _norm(norm: RMSNorm, x: Tensor, rotation: KeyValue | None, out: Tensor) -> None:
    heads.norm(x, norm.weight_of(len(x)), norm.eps, rotation, out)
