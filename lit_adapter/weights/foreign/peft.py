"""PEFT's AdaptionPrompt: a folder of ``adapter_model.safetensors`` and ``adapter_config.json``.

One gate per layer, without tanh. PEFT sends the prefix's sum through the output projection on its own, which
equals ours only if that projection has no bias.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save

from lit_adapter.errors import UserError
from lit_adapter.files.read import read_json
from lit_adapter.files.write import write_bytes, write_json
from lit_adapter.model.config import AdapterConfig, GateName, LlamaConfig
from lit_adapter.model.prefix import prefix_name
from lit_adapter.weights.adapter_file import AdapterInfo
from lit_adapter.weights.foreign.format import Format, Opened, refuse_rest, take_prefixes
from lit_adapter.weights.plain import PlainAdapter, State
from lit_adapter.weights.shards import member

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_TYPE = "ADAPTION_PROMPT"
PROMPT = "base_model.model.model.layers.{}.self_attn.adaption_prompt"
GATE = "base_model.model.model.layers.{}.self_attn.adaption_gate"


class Peft(Format):
    """AdaptionPrompt."""

    name = "peft"
    families = ("llama", "mistral")
    gate: GateName | None = "layer"
    weights = (WEIGHTS, "adapter_model.bin")
    companion = CONFIG
    is_certain = True

    def recognise(self, opened: Opened) -> str | None:
        """Recognise it by the configuration in the folder or, for a file, by the names of the gates."""
        is_folder = opened.path.is_dir()
        if not is_folder and not any(name.endswith(".self_attn.adaption_gate") for name in opened.tensors):
            return None
        path = member(opened.path if is_folder else opened.path.parent, CONFIG)
        config = read_json(path)
        kind = config.get("peft_type") if isinstance(config, dict) else None
        if kind != PEFT_TYPE:
            raise UserError(f"{path}: peft_type is {kind!r}; expected {PEFT_TYPE} or LORA")
        return CONFIG if is_folder else "adaption_gate"

    def read(self, opened: Opened, model: LlamaConfig, gate: GateName | None = None) -> PlainAdapter:
        """Return the adapter."""
        _refuse_bias(model)
        source, left = opened.path, dict(opened.tensors)
        state, sizes, _ = take_prefixes(left, PROMPT, GATE, "layer", model, source)
        if not state:
            raise UserError(f"{source}: tensor {PROMPT.format('N')} is missing in every layer")
        refuse_rest(left, source, f"PEFT's {PEFT_TYPE}")
        return PlainAdapter(AdapterConfig(norms=False, **sizes), state)

    def check_writable(self, config: AdapterConfig, model: LlamaConfig) -> None:
        """Refuse trained norms, biases and scales, and a base with biases in attention."""
        super().check_writable(config, model)
        if "norms" in config.parts:
            what = "a V2 adapter" if "linears" in config.parts else "an adapter with norms"
            raise UserError(
                f"PEFT's AdaptionPrompt has no norms, biases or scales, so it cannot hold {what}; "
                "use --to litgpt, or scripts/merge.py if the adapter has no prompts"
            )
        if "lora" in config.parts:
            raise UserError(
                "PEFT's AdaptionPrompt has no LoRA beside its prompts, so it cannot hold this adapter; "
                "one without prompts can be written with --to peft-lora"
            )
        _refuse_bias(model)

    def write(self, adapter: PlainAdapter, model: LlamaConfig) -> State:
        """Return prompts ``[1, K, C]`` and gates ``[1]``."""
        found: State = {}
        for layer in adapter.config.adapted_layers(model.n_layer):
            found[PROMPT.format(layer)] = adapter.state[f"{prefix_name(layer)}.prompt"][None].contiguous()
            found[GATE.format(layer)] = adapter.state[f"{prefix_name(layer)}.gate"]
        return found

    def save(self, out: Path, tensors: State, info: AdapterInfo) -> None:
        """Write the folder's files."""
        write_bytes(out / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        settings = {
            "peft_type": PEFT_TYPE,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": info.base.name,
            "inference_mode": True,
            "adapter_len": info.adapter.prompt_length,
            "adapter_layers": len(info.adapter.adapted_layers(info.model.n_layer)),
            "target_modules": None,
        }
        write_json(out / CONFIG, settings)


def _refuse_bias(model: LlamaConfig) -> None:
    if model.attention_bias:
        raise UserError(
            "PEFT adds the bias of the output projection a second time for the prefix, so on a base with "
            "attention_bias its adapters and ours compute different functions; use another format"
        )
