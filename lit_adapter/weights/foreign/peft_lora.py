"""PEFT's LoRA: a folder of ``adapter_model.safetensors`` and ``adapter_config.json``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save

from lit_adapter.errors import UserError, shorten
from lit_adapter.files.read import read_json
from lit_adapter.files.write import write_bytes, write_json
from lit_adapter.model.config import AdapterConfig, GateName, LlamaConfig
from lit_adapter.model.layout import block_layout, block_names
from lit_adapter.model.lora_config import GROUPS, LoraConfig
from lit_adapter.weights.adapter_file import AdapterInfo
from lit_adapter.weights.foreign.format import Format, Opened, refuse_rest, take
from lit_adapter.weights.foreign.peft import CONFIG, WEIGHTS
from lit_adapter.weights.plain import PlainAdapter, State
from lit_adapter.weights.shards import member

PEFT_TYPE = "LORA"
A, B = ("base_model.model.model.{}.lora_A.weight", "base_model.model.model.{}.lora_B.weight")
_NAME = re.compile(r"base_model\.model\.model\.layers\.\d+\.\w+\.(\w+)\.lora_[AB]\.weight")
PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
}
"""Settings that could change what LoRA computes, and the values with which they do not."""


class PeftLora(Format):
    """LoRA on the linear layers of the blocks."""

    name = "peft-lora"
    weights = (WEIGHTS, "adapter_model.bin")
    companion = CONFIG
    is_certain = True

    def recognise(self, opened: Opened) -> str | None:
        """Recognise it by the configuration in the folder or, for a file, by the names of its tensors."""
        is_folder = opened.path.is_dir()
        if not is_folder and not any(name.endswith(".lora_A.weight") for name in opened.tensors):
            return None
        config = read_json(_companion(opened))
        if not isinstance(config, dict) or config.get("peft_type") != PEFT_TYPE:
            return None
        return CONFIG if is_folder else "lora_A"

    def read(self, opened: Opened, model: LlamaConfig, gate: GateName | None = None) -> PlainAdapter:
        """Return the adapter."""
        source, left = opened.path, dict(opened.tensors)
        on = sorted({match[1] for match in map(_NAME.fullmatch, left) if match}, key=GROUPS["all"].index)
        if not on:
            raise UserError(f"{source}: no tensor is named as PEFT's LoRA names those of a LLaMA")
        chosen = block_layout(model).projections(on)
        state: State = {}
        rank = len(next(tensor for name, tensor in left.items() if name.endswith(".lora_A.weight")))
        lora = opened.info.adapter.lora if opened.info is not None else _lora(_companion(opened), rank, on)
        for block in block_names(model):
            for linear in chosen:
                name = f"{block}.{linear.name}"
                state[f"{name}.lora_a"] = take(left, A.format(name), (rank, linear.n_in), source)
                state[f"{name}.lora_b"] = take(left, B.format(name), (linear.n_out, rank), source)
        refuse_rest(left, source, "PEFT's LoRA on a LLaMA's linear layers")
        return PlainAdapter(AdapterConfig(prompt_length=0, lora=lora), state)

    def check_writable(self, config: AdapterConfig, model: LlamaConfig) -> None:
        """Refuse an adapter that trains anything but LoRA."""
        if not config.lora.rank:
            raise UserError("the adapter has no LoRA; write its prompts with --to peft")
        if config.prompt_length or set(config.parts) - {"prefix", "lora"}:
            raise UserError(
                "PEFT's LoRA has no prompts, norms, biases or scales, so it cannot hold this adapter"
            )

    def write(self, adapter: PlainAdapter, model: LlamaConfig) -> State:
        """Return the factors A ``[r, n_in]`` and B ``[n_out, r]``."""
        found: State = {}
        for name, tensor in adapter.state.items():
            layer, _, factor = name.rpartition(".")
            found[(A if factor == "lora_a" else B).format(layer)] = tensor
        return found

    def save(self, out: Path, tensors: State, info: AdapterInfo) -> None:
        """Write the folder's files."""
        write_bytes(out / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        lora = info.adapter.lora
        settings = {
            "peft_type": PEFT_TYPE,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": info.base.name,
            "inference_mode": True,
            "r": lora.rank,
            "lora_alpha": lora.alpha if lora.alpha is not None else 2 * lora.rank,
            "lora_dropout": lora.dropout,
            "use_rslora": lora.rank_stabilised,
            "bias": "none",
            "target_modules": sorted(lora.layers),
        }
        write_json(out / CONFIG, settings)


def _companion(opened: Opened) -> Path:
    return member(opened.path if opened.path.is_dir() else opened.path.parent, CONFIG)


def _lora(path: Path, rank: int, on: list[str]) -> LoraConfig:
    """Return the settings of a PEFT configuration; refuse by name what they cannot express."""
    config = read_json(path)
    for key, plain in PLAIN.items():
        if config.get(key) not in plain:
            raise UserError(f"{path}: {key} is {shorten(config[key])}, which our LoRA does not have")
    try:
        alpha, dropout = float(config["lora_alpha"]), float(config.get("lora_dropout") or 0.0)
        if int(config["r"]) != rank:
            raise UserError(f"{path}: r is {config['r']}, but the tensors have rank {rank}")
        return LoraConfig(rank, alpha, tuple(on), dropout, bool(config.get("use_rslora")))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a configuration of PEFT's LoRA ({error})") from None
