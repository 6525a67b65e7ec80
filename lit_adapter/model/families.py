"""The families of models, as Hugging Face's ``config.json`` spells them. No torch.

A family is a configuration: `read` turns its file into the fields of `LlamaConfig`, and `write` does the
reverse. The model itself knows nothing of families.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lit_adapter.errors import UserError
from lit_adapter.model.config_keys import divided_head_dim, given, required
from lit_adapter.model.relatives import RELATIVES
from lit_adapter.model.rope_config import RopeConfig

if TYPE_CHECKING:
    from lit_adapter.model.config import LlamaConfig

FamilyName = Literal["llama", "mistral", "qwen2", "qwen3", "smollm3"]
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
KINDS = ("full_attention", "sliding_attention")
"""Layers without and with a window, as ``layer_types`` names them."""
Layers = dict[str, Any]
"""The fields `window`, `windowed_layers` and `unrotated_layers`, where a family has them."""


@dataclass(frozen=True)
class Family:
    """What a file of one `model_type` can say, and what transformers assumes where it says nothing."""

    architecture: str
    """The class of transformers."""
    bias_keys: tuple[str, ...] = ()
    """The settings for biases in the file."""
    qkv_bias: bool = False
    """Whether queries, keys and values always have a bias, and no other layer has."""
    head_norms: bool = False
    windows: Literal["none", "all layers", "listed"] = "none"
    """Which layers may have a window."""
    skips_rotation: bool = False
    """Whether some layers may have no rotary positions."""
    head_dim: int | None = None
    """The size of a head, if it is not the width divided by the number of heads."""
    context_length: int = 32_768
    theta: float = 10_000.0
    tied: bool = False

    def expresses(self, config: LlamaConfig) -> bool:
        """Whether a file of this family can say all of a configuration."""
        n_windows = {"none": (0,), "all layers": (0, config.n_layer), "listed": range(config.n_layer + 1)}
        return (
            config.qkv_bias == self.qkv_bias
            and all(getattr(config, key) <= (key in self.bias_keys) for key in ("attention_bias", "mlp_bias"))
            and config.head_norms == self.head_norms
            and bool(config.unrotated_layers) <= self.skips_rotation
            and len(config.windowed_layers) in n_windows[self.windows]
        )


FAMILIES: dict[FamilyName, Family] = {
    "llama": Family("LlamaForCausalLM", bias_keys=("attention_bias", "mlp_bias"), context_length=2048),
    "mistral": Family("MistralForCausalLM", windows="all layers", context_length=131_072),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, windows="listed"),
    "qwen3": Family(
        "Qwen3ForCausalLM", bias_keys=("attention_bias",), head_norms=True, windows="listed", head_dim=128
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        bias_keys=("attention_bias", "mlp_bias"),
        windows="listed",
        skips_rotation=True,
        theta=2_000_000.0,
        tied=True,
    ),
}


def read(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the fields of `LlamaConfig` that a ``config.json`` says.

    Args:
        raw: the parsed file, in the spelling of transformers 4 or 5.
        source: its name, for messages.

    Raises:
        UserError: another architecture, a missing key, or a value that the family does not have.
    """
    name = _family_name(raw, source)
    family = FAMILIES[name]
    n_embd = required(raw, "hidden_size", source)
    n_head = required(raw, "num_attention_heads", source)
    n_layer = required(raw, "num_hidden_layers", source)
    head_dim = given(raw, "head_dim", family.head_dim)
    context_length = int(given(raw, "max_position_embeddings", family.context_length))
    return {
        "vocab_size": required(raw, "vocab_size", source),
        "n_layer": n_layer,
        "n_head": n_head,
        "n_kv_head": given(raw, "num_key_value_heads", n_head),
        "n_embd": n_embd,
        "head_dim": divided_head_dim(n_embd, n_head, "hidden_size") if head_dim is None else head_dim,
        "n_hidden": required(raw, "intermediate_size", source),
        "norm_eps": float(given(raw, "rms_norm_eps", 1e-6)),
        "context_length": context_length,
        "rope": RopeConfig.from_hf(raw, source, family.theta, context_length),
        "tie_embeddings": bool(given(raw, "tie_word_embeddings", family.tied)),
        "qkv_bias": family.qkv_bias,
        **{key: bool(raw.get(key, False)) for key in family.bias_keys},
        "head_norms": family.head_norms,
        **_read_layers(family, raw, n_layer, source),
        "family": name,
    }


def write(config: LlamaConfig) -> dict[str, Any]:
    """Return the ``config.json`` that transformers and `read` read.

    Raises:
        UserError: the configuration's family cannot say all of it; see `nearest`.
    """
    family = FAMILIES[config.family]
    if not family.expresses(config):
        raise UserError(f"a {config.family} model cannot have {_traits(config)}")
    return {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "hidden_size": config.n_embd,
        "head_dim": config.head_dim,
        "intermediate_size": config.n_hidden,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.context_length,
        "rope_parameters": config.rope.to_hf(),
        "tie_word_embeddings": config.tie_embeddings,
        **{key: getattr(config, key) for key in family.bias_keys},
        **_write_layers(family, config),
        # If a file says nothing, transformers uses the ids of the family's own vocabulary.
        **({} if config.family == "llama" else dict.fromkeys(TOKEN_IDS)),
    }


def nearest(config: LlamaConfig) -> LlamaConfig:
    """Return the configuration under the name of a family that can express it, its own if that can.

    Raises:
        UserError: no family can.
    """
    names: Iterable[FamilyName] = dict.fromkeys((config.family, *FAMILIES))
    for name in names:
        if FAMILIES[name].expresses(config):
            return replace(config, family=name)
    raise UserError(f"no family of models has {_traits(config)}")


def _traits(config: LlamaConfig) -> str:
    """Name what distinguishes a configuration from the plainest one."""
    traits = {
        "head norms": config.head_norms,
        "biases in attention": config.attention_bias,
        "biases on queries, keys and values alone": config.qkv_bias,
        "biases in the MLP": config.mlp_bias,
        "windows": bool(config.windowed_layers),
        "layers without rotary positions": bool(config.unrotated_layers),
    }
    return " together with ".join(trait for trait, has in traits.items() if has)


def _read_layers(family: Family, raw: dict[str, Any], n_layer: int, source: str) -> Layers:
    """Return what differs by layer."""
    unrotated = _unrotated_layers(raw, n_layer, source) if family.skips_rotation else ()
    window = raw.get("sliding_window") if family.windows != "none" else None
    if window is None or (family.windows == "listed" and not raw.get("use_sliding_window")):
        return {"unrotated_layers": unrotated}
    if family.windows == "all layers":
        windowed = tuple(range(n_layer))
    elif raw.get("layer_types") is not None:
        windowed = _listed_layers(raw["layer_types"], n_layer, source)
    else:
        windowed = unrotated if family.skips_rotation else _upper_layers(raw, n_layer, source)
    return {"window": window, "windowed_layers": windowed, "unrotated_layers": unrotated}


def _unrotated_layers(raw: dict[str, Any], n_layer: int, source: str) -> tuple[int, ...]:
    """Return the layers that ``no_rope_layers`` marks with 0; by default every fourth one."""
    marks, every = raw.get("no_rope_layers"), given(raw, "no_rope_layer_interval", 4)
    if marks is None:
        return tuple(layer for layer in range(n_layer) if (layer + 1) % every == 0)
    if not isinstance(marks, list) or len(marks) < n_layer or not all(mark in (0, 1) for mark in marks):
        raise UserError(f"{source}: no_rope_layers is {marks!r:.60}; expected 0 or 1 for {n_layer} layers")
    return tuple(layer for layer in range(n_layer) if not marks[layer])


def _upper_layers(raw: dict[str, Any], n_layer: int, source: str) -> tuple[int, ...]:
    """Return the layers from ``max_window_layers`` on."""
    start = required(raw, "max_window_layers", source)
    if not isinstance(start, int) or not 0 <= start <= n_layer:
        raise UserError(
            f"{source}: max_window_layers is {start!r:.60}; expected a number up to the {n_layer} layers"
        )
    return tuple(range(start, n_layer))


def _listed_layers(kinds: Any, n_layer: int, source: str) -> tuple[int, ...]:
    """Return the layers that ``layer_types`` gives a window."""
    if not isinstance(kinds, list) or len(kinds) != n_layer or not all(kind in KINDS for kind in kinds):
        raise UserError(
            f"{source}: layer_types is {kinds!r:.60}; expected {' or '.join(KINDS)} for {n_layer} layers"
        )
    return tuple(layer for layer, kind in enumerate(kinds) if kind == KINDS[1])


def _write_layers(family: Family, config: LlamaConfig) -> dict[str, Any]:
    """Return the keys of what differs by layer, in the spelling of transformers 4 and 5."""
    windowed, n_layer = config.windowed_layers, config.n_layer
    found: dict[str, Any] = {}
    if family.windows != "none":
        found["sliding_window"] = config.window if windowed else None
    if family.windows == "listed":
        found["use_sliding_window"] = bool(windowed)
        found["layer_types"] = [KINDS[layer in windowed] for layer in range(n_layer)]
        if not family.skips_rotation:
            found["max_window_layers"] = min(windowed, default=n_layer)
    if family.skips_rotation:
        found["no_rope_layers"] = [int(layer not in config.unrotated_layers) for layer in range(n_layer)]
    return found


def _family_name(raw: dict[str, Any], source: str) -> FamilyName:
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        *names, last = FAMILIES
        has = RELATIVES.get(kind) if isinstance(kind, str) else None
        what = f", which has {has}" if has else ""
        raise UserError(f"{source}: model_type is {kind!r}{what}; expected {', '.join(names)} or {last}")
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(f"{source}: hidden_act is {activation!r}; a {kind} model uses 'silu'")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise UserError(f"{source}: the weights are quantised ({method}); convert the original checkpoint")
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if raw.get(key):
            raise UserError(f"{source}: {key} is {raw[key]!r:.60}: a mixture of experts cannot be adapted")
    return kind
