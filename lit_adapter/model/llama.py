"""LLaMA and the families that differ from it by settings, written once: the frozen base of every adapter.

Parameters have the names of Hugging Face's ``LlamaForCausalLM`` without the leading ``model.``; `layout`
declares their sizes. Attention has one optional child, `prefix`. A `View` (see `attention`) says which keys
each query sees, so that packed rows, a plain batch and a cache share one forward pass.

Letters: B batch, T positions, C width, H query heads, G key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.joining import PackedWeights
from lit_adapter.model.layout import BlockLayout, block_layout
from lit_adapter.model.precision import widen
from lit_adapter.model.prefix import GatedPrefix, PrefixState
from lit_adapter.model.rope import inverse_frequencies, rotate, rotation

if TYPE_CHECKING:
    from lit_adapter.model.attention import BaseView, View


class _Normalised(torch.autograd.Function):
    """``x / rms(x)`` in x's dtype. It keeps x in that dtype; autograd would keep fp32, and be slower."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        wide = widen(x)
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, rstd)
        return (wide * rstd).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        x, rstd = ctx.saved_tensors
        wide, dwide = widen(x), widen(dy)
        along = (dwide * wide).mean(-1, keepdim=True) * rstd.square()
        return torch.addcmul(dwide, wide, along, value=-1).mul_(rstd).to(x.dtype), None


def normalised(x: Tensor, eps: float) -> Tensor:
    """Return ``x`` over the root mean square of its last dimension, in x's dtype."""
    return _Normalised.apply(x, eps)


def linear(layout: BlockLayout, name: str) -> Any:
    """Return a linear layer as declared; an adapter or an executor may put another module in its place."""
    declared = layout[name]
    return nn.Linear(declared.n_in, declared.n_out, declared.bias)


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467), computed in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of ``x [..., T, width]``, in x's dtype before and after the weight."""
        return (normalised(x, self.eps) * self.weight_of(x.shape[-2])).to(x.dtype)

    @property
    def used_weight(self) -> Tensor:
        """The weight that the norm multiplies by now."""
        return self.weight

    def weight_of(self, n: int) -> Tensor:
        """Return the weight for ``n`` tokens ``[width]``, or for each of them ``[n, width]``."""
        return self.used_weight


class Attention(nn.Module):
    """Grouped-query attention with one optional child, `prefix`."""

    prefix: GatedPrefix | None
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        layout = block_layout(config)
        self.index = index
        self.head_dim = config.head_dim
        self.window = config.window_of(index)
        self.is_rotated = index not in config.unrotated_layers
        self.q_proj = linear(layout, "self_attn.q_proj")
        self.k_proj = linear(layout, "self_attn.k_proj")
        self.v_proj = linear(layout, "self_attn.v_proj")
        self.o_proj = linear(layout, "self_attn.o_proj")
        self.q_norm, self.k_norm = (
            RMSNorm(config.head_dim, config.norm_eps) if config.head_norms else None for _ in "qk"
        )
        self.prefix = None

    def heads(self, x: Tensor) -> Tensor:
        """Split ``[..., T, heads * D]`` into ``[..., heads, T, D]``."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)

    def project_kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project ``x [..., T, C]`` to unrotated keys and values, each ``[..., G, T, D]``.

        Also used for a prompt: its keys pass the norm of keys if the model has one (see `prefix`).
        """
        k = self.heads(self.k_proj(x))
        return k if self.k_norm is None else self.k_norm(k), self.heads(self.v_proj(x))

    def project_q(self, x: Tensor) -> Tensor:
        """Project ``x [..., T, C]`` to unrotated queries ``[..., H, T, D]``."""
        q = self.heads(self.q_proj(x))
        return q if self.q_norm is None else self.q_norm(q)

    def forward(self, x: Tensor, view: BaseView, query_positions: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: ``[B, T, C]``.
            view: positions, and which of them each query sees.
            query_positions: positions whose output is computed ``[M]``; None for all of them.

        Returns:
            ``[B, T, C]``, or ``[B, M, C]`` with ``query_positions``.
        """
        k, v = self.project_kv(x)
        q = unrotated = self.project_q(x if query_positions is None else x[:, query_positions])
        if self.is_rotated:
            k = rotate(k, *view.rotation_at(None))
            q = rotate(unrotated, *view.rotation_at(query_positions))
        y = view.attend(self, q, k, v, query_positions)
        added = view.attend_prefix(self, q, unrotated, x.dtype)
        y = y if added is None else y + added
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU feed-forward (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        layout = block_layout(config)
        self.gate_proj = linear(layout, "mlp.gate_proj")
        self.up_proj = linear(layout, "mlp.up_proj")
        self.down_proj = linear(layout, "mlp.down_proj")

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., C]`` to ``[..., C]``."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One transformer layer: attention and MLP, each behind a norm and beside a residual."""

    fused_weights: Any = None
    """The block's matrices as the fused executor holds them."""
    total: Callable[[Tensor], Tensor] = staticmethod(lambda y: y)
    """Sums the partial results of the processes that share the block's heads; one process has all of them."""
    add_up_: Callable[[Tensor], Any] = staticmethod(lambda y: None)
    """Does the same in place, for executors that compute the gradients themselves."""

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def project_prefix(self, prefix: GatedPrefix | None, dtype: torch.dtype) -> PrefixState | None:
        """Return ``prefix`` with its prompt projected by this block's attention; None stays None."""
        if prefix is None:
            return None
        prompt = prefix.prompt.to(self.input_layernorm.weight.device, dtype)
        return prefix.state(*self.self_attn.project_kv(prompt))

    def forward(self, x: Tensor, view: View, query_positions: Tensor | None = None) -> Tensor:
        """Map ``x [B, T, C]`` to ``[B, T, C]``, or to ``[B, M, C]`` for ``query_positions [M]`` alone.

        The view decides how: its executor may compute the block without calling its modules.
        """
        return view.run(self, x, query_positions)

    def compute(self, x: Tensor, view: BaseView, query_positions: Tensor | None) -> Tensor:
        """Do what `forward` says by calling the modules."""
        residual = x if query_positions is None else x[:, query_positions]
        x = residual + self.total(self.self_attn(self.input_layernorm(x), view, query_positions))
        return x + self.total(self.mlp(self.post_attention_layernorm(x)))


class Llama(nn.Module):
    """The transformer. `forward` returns normed hidden states; `logits` maps them to logits."""

    inverse_frequency: Tensor
    adapter: AdapterConfig | None = None
    """The adapter that is attached; None without one."""
    decode_weights: Any = None
    """The model's matrices as the CPU decoding executor holds them."""
    is_sharded = False
    """Whether FSDP2 shards the matrices: they are whole only within the model's own forward passes."""
    n_shards = 1
    """Processes that share the heads and MLP of each layer; this one computes its shard of them."""
    agree_on: Callable[[Tensor], Any] = staticmethod(lambda logits: None)
    """Gives all processes that generate together the same logits, in place."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers: Any = nn.ModuleList(Block(config, index) for index in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer(
            "inverse_frequency", inverse_frequencies(config.rope, config.head_dim), persistent=False
        )
        self.packed_weights = PackedWeights()

    def rotation(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines of ``position [B, T]``, each ``[B, T, D/2]``."""
        return rotation(position, self.inverse_frequency, self.config.rope.attention_factor)

    def project_prefixes(self, dtype: torch.dtype) -> list[PrefixState | None]:
        """Return the state of every layer's own prefix, None for a layer without one."""
        return [block.project_prefix(block.self_attn.prefix, dtype) for block in self.layers]

    def forward(self, ids: Tensor, view: View, query_positions: Tensor | None = None) -> Tensor:
        """Run the model.

        Args:
            ids: token ids ``[B, T]``.
            view: positions, and which of them each query sees.
            query_positions: positions whose hidden states are returned ``[M]``; the last layer then computes
                queries, output projection and MLP for these alone. None for all positions.

        Returns:
            Hidden states after the final norm, ``[B, T, C]`` or ``[B, M, C]``.
        """
        x = self.embed_tokens(ids)
        for block in self.layers:
            x = block(x, view, query_positions if block is self.layers[-1] else None)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits ``[..., V]`` of normed hidden states ``[..., C]``."""
        logits = self.lm_head(hidden)
        self.agree_on(logits)
        return logits


def empty_llama(config: LlamaConfig) -> Llama:
    """Return a frozen model without values: its tensors are on the meta device."""
    with torch.device("meta"), _WithoutValues():
        return Llama(config).requires_grad_(False)


class _WithoutValues(TorchFunctionMode):
    """Skips the initialisation of parameters: on the meta device, torch would import its compiler for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))
