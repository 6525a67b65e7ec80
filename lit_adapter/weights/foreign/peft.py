"""PEFT's AdaptionPrompt: a folder of ``adapter_model.safetensors`` and ``adapter_config.json``.

One gate a layer, without tanh. PEFT projects the prefix part through the output projection by itself, which
equals our sum only where that projection has no bias.
"""

from __future__ import annotations

import re
from typing import Any

from lit_adapter.errors import UserError
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.weights.plain import LAYER, PlainAdapter, State, prefix, take, top_layers

NAME = "peft"
WEIGHTS, WEIGHTS_BIN, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
PEFT_TYPE = "ADAPTION_PROMPT"
_STEM = "base_model.model.model.layers"
_PROMPT = re.compile(rf"{re.escape(_STEM)}\.{LAYER}\.self_attn\.adaption_prompt")


def read(tensors: State, model: LlamaConfig, source: str) -> PlainAdapter:
    """Return the adapter.

    Raises:
        UserError: tensors that are missing, unknown, or not of this base's sizes.
    """
    _refuse_bias(model)
    left = dict(tensors)
    layers = sorted(int(m[1]) for m in map(_PROMPT.fullmatch, tensors) if m)
    if not layers:
        raise UserError(f"{source}: tensor {_STEM}.N.self_attn.adaption_prompt is missing in every layer")
    count = top_layers(layers, model.n_layer, source)
    length = left[f"{_STEM}.{layers[0]}.self_attn.adaption_prompt"].numel() // model.n_embd
    state: State = {}
    for layer in layers:
        stem = f"{_STEM}.{layer}.self_attn.adaption"
        state[f"{prefix(layer)}.prompt"] = take(left, f"{stem}_prompt", (length, model.n_embd), source)
        state[f"{prefix(layer)}.gate"] = take(left, f"{stem}_gate", (1,), source)
    if left:
        raise UserError(f"{source}: tensor {min(left)} is not one of PEFT's {PEFT_TYPE}")
    return PlainAdapter(AdapterConfig(prompt_length=length, layers=count, gate="layer"), state)


def write(adapter: PlainAdapter, model: LlamaConfig) -> State:
    """Return PEFT's tensors of an adapter whose gates are of form ``layer``."""
    found: State = {}
    for layer in adapter.config.adapted_layers(model.n_layer):
        stem = f"{_STEM}.{layer}.self_attn.adaption"
        found[f"{stem}_prompt"] = adapter.state[f"{prefix(layer)}.prompt"][None].contiguous()
        found[f"{stem}_gate"] = adapter.state[f"{prefix(layer)}.gate"]
    return found


def check_writable(config: AdapterConfig, model: LlamaConfig) -> None:
    """Refuse what PEFT has no place for.

    Raises:
        UserError: a V2 adapter, or a base with biases.
    """
    if config.version == "v2":
        raise UserError(
            "PEFT's AdaptionPrompt has no norms, biases and scales, so a V2 adapter cannot be written for "
            "it; write litgpt, or a plain LLaMA with scripts/merge.py if it has no prompts"
        )
    _refuse_bias(model)


def _refuse_bias(model: LlamaConfig) -> None:
    if model.attention_bias:
        raise UserError(
            "PEFT adds the output projection's bias once more for the prefix, so on a base with "
            "attention_bias its adapters and ours are different functions; convert from and to other formats"
        )


def settings(adapter: PlainAdapter, model: LlamaConfig, base: str) -> dict[str, Any]:
    """Return the content of ``adapter_config.json``."""
    return {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "adapter_len": adapter.config.prompt_length,
        "adapter_layers": len(adapter.config.adapted_layers(model.n_layer)),
        "target_modules": None,
    }
