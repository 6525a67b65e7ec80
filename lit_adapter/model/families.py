"""The families of models, as Hugging Face's ``config.json`` spells them. No torch.

A family is a configuration: `read` turns its file into the fields of `LlamaConfig`, and `write` does the
reverse. The model itself knows no families.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lit_adapter.errors import UserError
from lit_adapter.model.config_keys import divided_head_dim, given, required
from lit_adapter.model.rope_config import RopeConfig

if TYPE_CHECKING:
    from lit_adapter.model.config import LlamaConfig

FamilyName = Literal["llama", "qwen2"]


@dataclass(frozen=True)
class Family:
    """What a file of one `model_type` can say."""

    architecture: str
    """The class of transformers."""
    bias_keys: tuple[str, ...] = ()
    """The settings of biases that the file has."""
    qkv_bias: bool = False
    """Whether queries, keys and values always have a bias."""


FAMILIES: dict[FamilyName, Family] = {
    "llama": Family("LlamaForCausalLM", bias_keys=("attention_bias", "mlp_bias")),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
}


def read(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the fields of `LlamaConfig` that a ``config.json`` says.

    Args:
        raw: the parsed file, in the spelling of transformers 4 or 5.
        source: its name, for messages.

    Raises:
        UserError: another architecture, a missing key, or an unknown kind of RoPE.
    """
    name = _family_name(raw, source)
    family = FAMILIES[name]
    n_embd = required(raw, "hidden_size", source)
    n_head = required(raw, "num_attention_heads", source)
    head_dim = raw.get("head_dim")
    return {
        "vocab_size": required(raw, "vocab_size", source),
        "n_layer": required(raw, "num_hidden_layers", source),
        "n_head": n_head,
        "n_kv_head": given(raw, "num_key_value_heads", n_head),
        "n_embd": n_embd,
        "head_dim": divided_head_dim(n_embd, n_head, "hidden_size") if head_dim is None else head_dim,
        "n_hidden": required(raw, "intermediate_size", source),
        "norm_eps": float(given(raw, "rms_norm_eps", 1e-6)),
        "context_length": int(given(raw, "max_position_embeddings", 2048)),
        "rope": RopeConfig.from_hf(raw, source),
        "tie_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "qkv_bias": family.qkv_bias,
        **{key: bool(raw.get(key, False)) for key in family.bias_keys},
        "family": name,
    }


def write(config: LlamaConfig) -> dict[str, Any]:
    """Return the ``config.json`` that transformers and `read` read."""
    family = FAMILIES[config.family]
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
    }


def _family_name(raw: dict[str, Any], source: str) -> FamilyName:
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        *names, last = FAMILIES
        raise UserError(f"{source}: model_type is {kind!r}; expected {', '.join(names)} or {last}")
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(f"{source}: hidden_act is {activation!r}; a {kind} model uses 'silu'")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise UserError(f"{source}: the weights are quantised ({method}); convert the original checkpoint")
    return kind
