"""The one frozen base that all methods of a benchmark share, as our model and as transformers'."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_adapter.errors import UserError
from lit_adapter.model.adapter import adapter_parameters
from lit_adapter.model.config import LlamaConfig
from lit_adapter.model.llama import Llama
from lit_adapter.weights.load import load_base

LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
LLAMA_7B |= {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32}
LLAMA_7B |= {"num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False}
LLAMA3_8B = LLAMA_7B | {
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
}
QWEN3_8B = LLAMA3_8B | {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}
SHAPES: dict[str, dict[str, Any]] = {"7b": LLAMA_7B, "llama3-8b": LLAMA3_8B, "qwen3-8b": QWEN3_8B}
ADAPTED = {"7b": 30}
"""Adapted layers (L) as in the paper; in other models, all layers are adapted."""


@dataclass
class Base:
    """A loaded base."""

    name: str
    hf: dict[str, Any]
    """Its ``config.json``."""
    model: Llama

    @property
    def adapted(self) -> int:
        """How many of the top layers are adapted (L)."""
        return ADAPTED.get(self.name, self.model.config.n_layer)

    @property
    def device(self) -> torch.device:
        """Its device."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Its precision."""
        return self.model.embed_tokens.weight.dtype

    @property
    def n_bytes(self) -> int:
        """Bytes of the frozen weights, a tied output layer counted once."""
        trained = {name for name, _ in adapter_parameters(self.model)}
        own = [p for name, p in self.model.named_parameters() if name not in trained]
        return sum(parameter.numel() * parameter.element_size() for parameter in own)


def read_base(name: str, device: torch.device, dtype: torch.dtype, seed: int) -> Base:
    """Load a converted base folder, or make a base of a known shape with random weights.

    Raises:
        UserError: neither a shape nor a folder.
    """
    if name in SHAPES:
        return Base(name, SHAPES[name], random_base(SHAPES[name], device, dtype, seed))
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise UserError(f"--model {name}: expected a converted base folder or {', '.join(SHAPES)}")
    hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Base(folder.name, hf, load_base(folder, device=device, dtype=dtype))


def random_base(hf: dict[str, Any], device: torch.device, dtype: torch.dtype, seed: int) -> Llama:
    """Return a frozen model of random weights, made on its device."""
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_hf(hf))
    generator = torch.Generator(device).manual_seed(seed)
    state = {
        name: torch.empty(tensor.shape, device=device, dtype=dtype).normal_(
            1.0 if tensor.ndim == 1 else 0.0, 0.02, generator=generator
        )
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(device).requires_grad_(False)


def causal_model(base: Base) -> Any:
    """Return transformers' model over the very same weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    config: Any = transformers.AutoConfig.for_model(**base.hf)
    config._attn_implementation = "sdpa"
    config.dtype = base.dtype
    with torch.device("meta"):
        causal: Any = transformers.AutoModelForCausalLM.from_config(config)
    state = base.model.state_dict()
    for name, _ in adapter_parameters(base.model):
        del state[name]
    state = {name if name.startswith("lm_head.") else f"model.{name}": p for name, p in state.items()}
    causal.load_state_dict(state, strict=True, assign=True)
    if config.tie_word_embeddings:
        causal.lm_head.weight = causal.model.embed_tokens.weight
    causal.model.rotary_emb = type(causal.model.rotary_emb)(config=config).to(base.device)
    return causal.requires_grad_(False).eval()
