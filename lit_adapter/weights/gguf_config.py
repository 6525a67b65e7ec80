"""The configuration in the keys of a GGUF file, and the architecture that computes a configuration.

llama.cpp hard-codes what is not in its files: in ``smollm3`` every fourth layer has no rotary positions.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_adapter.errors import UserError
from lit_adapter.model.config import LlamaConfig
from lit_adapter.model.families import FamilyName
from lit_adapter.model.relatives import RELATIVES
from lit_adapter.model.rope import inverse_frequencies
from lit_adapter.model.rope_config import RopeConfig, yarn_scale

ARCHITECTURES: dict[str, FamilyName] = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
}
"""The family of each ``general.architecture``; Mistral's files are of ``llama``."""
META_ROWS = ("llama", "smollm3")
"""Architectures that keep the rows of q and k in Meta's rotary order, as llama.cpp's converters do."""
ROPE_TABLE = "rope_freqs.weight"


def architecture_of(config: LlamaConfig, source: Path) -> str:
    """Return the architecture by which llama.cpp computes a configuration, whatever its family is called.

    Raises:
        UserError: none computes it; names the ``source`` that has it.
    """
    rope, unrotated = config.rope, config.unrotated_layers
    names = {"qwen3": config.head_norms, "smollm3": bool(unrotated), "qwen2": config.qkv_bias}
    name = next((name for name, has in names.items() if has), "llama")
    listed = ", ".join(map(str, unrotated))
    lacks = {
        f"layers without rotary positions other than every fourth one (here {listed})": unrotated
        not in ((), every_fourth(config.n_layer)),
        "head norms together with biases": name == "qwen3" and config.attention_bias,
        "layers without rotary positions together with biases": name == "smollm3"
        and (config.attention_bias or config.mlp_bias),
        "LLaMA 3's scaling of rotary positions outside llama": rope.kind == "llama3" and name != "llama",
        "yarn without truncation": rope.kind == "yarn" and not rope.truncate,
    }
    for what, has in lacks.items():
        if has:
            raise UserError(f"{source}: cannot go into a GGUF file: llama.cpp lacks {what}")
    return name


def every_fourth(n_layer: int) -> tuple[int, ...]:
    """Return the layers without rotary positions of the architecture ``smollm3``."""
    return tuple(range(3, n_layer, 4))


@dataclass(frozen=True)
class GGUFKeys:
    """The keys of a file under its architecture, such as ``qwen2.block_count``.

    Raises:
        UserError: an architecture that cannot be adapted, a shard, or a mixture of experts.
    """

    path: Path
    fields: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            *names, last = ARCHITECTURES
            has = RELATIVES.get(self.architecture) if isinstance(self.architecture, str) else None
            raise UserError(
                f"{self.path}: general.architecture is {self.architecture!r}"
                f"{f', which has {has}' if has else ''}; expected {', '.join(names)} or {last}"
            )
        if self.fields.get("split.count", 1) > 1:
            raise UserError(f"{self.path}: one of {self.fields['split.count']} shards; merge them first")
        if self.get("expert_count", 0) > 0:
            raise UserError(f"{self.path}: a mixture of experts; only models without experts can be adapted")

    @property
    def architecture(self) -> Any:
        """``general.architecture``."""
        return self.fields.get("general.architecture")

    def name(self, key: str) -> str:
        """Return a key's whole name."""
        return f"{self.architecture}.{key}"

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or the default."""
        return self.fields.get(self.name(key), default)

    def need(self, key: str) -> Any:
        """Return a required value."""
        if self.get(key) is None:
            raise UserError(f"{self.path}: key '{self.name(key)}' is missing")
        return self.get(key)


def config_of(
    keys: GGUFKeys, shapes: Mapping[str, tuple[int, ...]], table: NDArray[np.float32] | None
) -> LlamaConfig:
    """Return the configuration of a file.

    Args:
        keys: of the file.
        shapes: of its tensors.
        table: the content of `ROPE_TABLE`, if the file has it.

    Raises:
        UserError: a key that is missing, or a value that the family does not have.
    """
    path, n_head = keys.path, keys.need("attention.head_count")
    embedding = shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise UserError(f"{path}: tensor token_embd.weight is missing or not a matrix")
    n_embd, n_layer = keys.need("embedding_length"), keys.need("block_count")
    n_kv_head = keys.get("attention.head_count_kv", n_head)
    if not isinstance(n_head, int) or not isinstance(n_kv_head, int):
        raise UserError(f"{path}: layers differ in their number of heads; those of a LLaMA do not")
    head_dim = keys.get("attention.key_length") or n_embd // max(n_head, 1)
    for other in ("attention.value_length", "rope.dimension_count"):
        if keys.get(other, head_dim) != head_dim:
            raise UserError(f"{path}: key '{keys.name(other)}' is {keys.get(other)}; expected {head_dim}")
    attention_bias = "blk.0.attn_output.bias" in shapes
    context_length = keys.need("context_length")
    return LlamaConfig(
        vocab_size=embedding[0],
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_kv_head,
        n_embd=n_embd,
        head_dim=head_dim,
        n_hidden=keys.need("feed_forward_length"),
        norm_eps=float32(keys.need("attention.layer_norm_rms_epsilon")),
        context_length=context_length,
        rope=_rope(keys, head_dim, context_length, table),
        tie_embeddings="output.weight" not in shapes,
        attention_bias=attention_bias,
        qkv_bias="blk.0.attn_q.bias" in shapes and not attention_bias,
        mlp_bias="blk.0.ffn_up.bias" in shapes,
        head_norms="blk.0.attn_q_norm.weight" in shapes,
        **_layers(keys, n_layer, context_length),
    )


def _layers(keys: GGUFKeys, n_layer: int, context_length: int) -> dict[str, Any]:
    """Return the settings that differ by layer, and the family of the file."""
    family, window = ARCHITECTURES[keys.architecture], keys.get("attention.sliding_window")
    unrotated = every_fourth(n_layer) if family == "smollm3" else ()
    if not window or window >= context_length:
        return {"family": family, "unrotated_layers": unrotated}
    if family != "llama":
        raise UserError(
            f"{keys.path}: key '{keys.name('attention.sliding_window')}' is {window}, but the file does not "
            "say which layers have the window; convert the original checkpoint"
        )
    return {"family": "mistral", "window": window, "windowed_layers": tuple(range(n_layer))}


def _rope(
    keys: GGUFKeys, head_dim: int, context_length: int, table: NDArray[np.float32] | None
) -> RopeConfig:
    theta = float32(keys.get("rope.freq_base", 10_000.0))
    kind = keys.get("rope.scaling.type", "none")
    factor = float(keys.get("rope.scaling.factor") or keys.get("rope.scale_linear") or 1.0)
    if kind not in ("none", "linear", "yarn"):
        raise UserError(
            f"{keys.path}: key '{keys.name('rope.scaling.type')}' is '{kind}'; expected none, linear or yarn"
        )
    if table is not None:
        return _llama3(keys, head_dim, theta, factor, table)
    if kind == "yarn":
        scales = (keys.get(f"rope.scaling.{name}attn_factor") for name in ("", "yarn_"))
        scale = next((float(given) for given in scales if given), 1.0)
        return RopeConfig(
            theta=theta,
            kind="yarn",
            factor=factor,
            original_context_length=int(keys.get("rope.scaling.original_context_length") or context_length),
            beta_fast=float(keys.get("rope.scaling.yarn_beta_fast") or 32.0),
            beta_slow=float(keys.get("rope.scaling.yarn_beta_slow") or 1.0),
            attention_factor=scale * yarn_scale(factor),
        )
    return RopeConfig(theta, "linear", factor) if factor != 1 else RopeConfig(theta)


def _llama3(
    keys: GGUFKeys, head_dim: int, theta: float, factor: float, table: NDArray[np.float32]
) -> RopeConfig:
    """Return the scaling that a table of factors follows."""
    if table.size != head_dim // 2 or factor != 1:
        raise UserError(
            f"{keys.path}: tensor {ROPE_TABLE}: expected {head_dim // 2} float32 values and no factor"
        )
    if np.array_equal(table, np.ones_like(table)):
        return RopeConfig(theta)
    original = int(keys.get("rope.scaling.original_context_length") or 8192)
    rope = RopeConfig(theta, "llama3", float(table.max()), 1.0, 4.0, original)
    plain, scaled = (inverse_frequencies(one, head_dim).numpy() for one in (RopeConfig(theta), rope))
    if not np.allclose(table, plain / scaled, rtol=1e-4):
        raise UserError(
            f"{keys.path}: tensor {ROPE_TABLE} follows no LLaMA 3 scaling of factor {rope.factor:g}; "
            "convert the original checkpoint"
        )
    return rope


def float32(value: float) -> float:
    """Return the shortest number that rounds to a stored float32: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
