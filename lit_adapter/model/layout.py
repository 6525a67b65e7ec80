"""What a LLaMA is made of: every linear layer, norm and embedding, declared once.

Modules, the shapes of checkpoints, the adapter's widths, the joined matrices of the executors, tensor
parallelism, merging and the formats of other code bases are derived from this declaration. Names are those of
Hugging Face's ``LlamaForCausalLM``. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Literal

from lit_adapter.model.config import LlamaConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Linear:
    """A linear layer ``y = W x + b`` with ``W [n_out, n_in]``."""

    name: str
    """Within the block, such as ``self_attn.q_proj``."""
    n_in: int
    n_out: int
    bias: bool
    shard: Literal["outputs", "inputs"]
    """The axis that tensor parallelism divides. Shards of the inputs give partial sums."""
    group: str
    """Layers of one group read the same input; executors join their matrices."""
    rotated_heads: int = 0
    """Heads of the outputs that are rotated; 0 for outputs that are not."""

    @property
    def projection(self) -> str:
        """Its name without the module that holds it, such as ``q_proj``."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Norm:
    """A root mean square norm of the last ``width`` numbers."""

    name: str
    width: int


@dataclass(frozen=True)
class BlockLayout:
    """One transformer block."""

    norms: tuple[Norm, ...]
    linears: tuple[Linear, ...]

    def __getitem__(self, name: str) -> Linear:
        """Return a linear layer by name."""
        return next(linear for linear in self.linears if linear.name == name)

    def projections(self, chosen: Collection[str]) -> list[Linear]:
        """Return the linear layers whose `Linear.projection` is in ``chosen``, in the order of the block."""
        return [linear for linear in self.linears if linear.projection in chosen]

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The names of the linear layers of each group, in the order in which they are joined."""
        names = dict.fromkeys(linear.group for linear in self.linears)
        return {g: tuple(linear.name for linear in self.linears if linear.group == g) for g in names}

    def outputs(self, group: str) -> dict[str, slice]:
        """Return where each layer's outputs are among those of its group's joined matrix."""
        names = self.groups[group]
        ends = accumulate(self[name].n_out for name in names)
        return {name: slice(end - self[name].n_out, end) for name, end in zip(names, ends, strict=True)}

    def shapes(self) -> Iterator[tuple[str, Shape]]:
        """Yield the name and shape of every tensor of the block."""
        for norm in self.norms:
            yield f"{norm.name}.weight", (norm.width,)
        for linear in self.linears:
            yield f"{linear.name}.weight", (linear.n_out, linear.n_in)
            if linear.bias:
                yield f"{linear.name}.bias", (linear.n_out,)


@cache
def block_layout(config: LlamaConfig) -> BlockLayout:
    """Return the declaration of a block; the tensors of all blocks of a model are alike."""
    C, M = config.n_embd, config.n_hidden
    n_query, n_kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    attention, mlp = config.attention_bias, config.mlp_bias
    qkv = attention or config.qkv_bias
    norms = Norm("input_layernorm", C), Norm("post_attention_layernorm", C)
    head_norms = Norm("self_attn.q_norm", config.head_dim), Norm("self_attn.k_norm", config.head_dim)
    return BlockLayout(
        norms=norms + (head_norms if config.head_norms else ()),
        linears=(
            Linear("self_attn.q_proj", C, n_query, qkv, "outputs", "qkv", config.n_head),
            Linear("self_attn.k_proj", C, n_kv, qkv, "outputs", "qkv", config.n_kv_head),
            Linear("self_attn.v_proj", C, n_kv, qkv, "outputs", "qkv"),
            Linear("self_attn.o_proj", n_query, C, attention, "inputs", "o"),
            Linear("mlp.gate_proj", C, M, mlp, "outputs", "gate_up"),
            Linear("mlp.up_proj", C, M, mlp, "outputs", "gate_up"),
            Linear("mlp.down_proj", M, C, mlp, "inputs", "down"),
        ),
    )


def block_names(config: LlamaConfig) -> list[str]:
    """Return the names of the blocks, lowest first."""
    return [f"layers.{index}" for index in range(config.n_layer)]


OUTPUT_LAYER, FINAL_NORM, EMBEDDING = "lm_head", "norm", "embed_tokens"


def model_shapes(config: LlamaConfig) -> dict[str, Shape]:
    """Return the shape of every tensor of `Llama`; a tied output layer has none of its own."""
    V, C = config.vocab_size, config.n_embd
    shapes: dict[str, Shape] = {f"{EMBEDDING}.weight": (V, C), f"{FINAL_NORM}.weight": (C,)}
    if not config.tie_embeddings:
        shapes[f"{OUTPUT_LAYER}.weight"] = (V, C)
    for block in block_names(config):
        shapes |= {f"{block}.{name}": shape for name, shape in block_layout(config).shapes()}
    return shapes


def base_shapes(config: LlamaConfig) -> dict[str, Shape]:
    """Return the shape of every tensor of a base's files, under the names of LlamaForCausalLM."""
    return {checkpoint_name(name): shape for name, shape in model_shapes(config).items()}


def checkpoint_name(name: str) -> str:
    """Return the name in a base's files of a tensor of `Llama`."""
    return name if name.startswith(f"{OUTPUT_LAYER}.") else f"model.{name}"


def n_block_parameters(config: LlamaConfig) -> int:
    """Return how many numbers one block has."""
    return n_numbers(dict(block_layout(config).shapes()))


def n_numbers(shapes: Mapping[str, Shape]) -> int:
    """Return how many numbers tensors of these shapes have."""
    return sum(map(math.prod, shapes.values()))
