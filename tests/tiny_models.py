"""Tiny random models, ours and transformers', for the tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor

from lit_adapter.model.adapter import adapter_parameters, attach
from lit_adapter.model.attention import CausalView
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.llama import Llama

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "n_layer": 3,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 32,
    "head_dim": 8,
    "n_hidden": 40,
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter values large enough that every part of the model has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = 1.5 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.3
            parameter.copy_(noise * scale + (parameter.ndim == 1))


def random_llama(seed: int = 0, dtype: torch.dtype = torch.float64, **sizes: Any) -> Llama:
    """A frozen base of ours; the rotary frequencies stay in fp32, as in `load_base`."""
    model = Llama(LlamaConfig(**{**SIZES, **sizes}))
    randomise(model, seed)
    frequency = model.inverse_frequency
    model = model.to(dtype).requires_grad_(False)
    model.inverse_frequency = frequency
    return model


def open_adapter(model: Llama, config: AdapterConfig, seed: int = 0, gate: float = 0.7) -> Llama:
    """Attach prefixes with random gates instead of zeros, in fp64 if the base is."""
    attach(model, config, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    wide = model.embed_tokens.weight.dtype == torch.float64
    for _, parameter in adapter_parameters(model):
        if wide:
            parameter.data = parameter.data.double()
    with torch.no_grad():
        for name, parameter in adapter_parameters(model):
            if name.endswith(".gate"):
                parameter.normal_(0.0, gate, generator=generator)
            elif ".adapter_" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter += 0.3 * noise
            elif name.endswith(".lora_b"):
                parameter.normal_(0.0, 0.3, generator=generator)
    return model


def halved(model: Llama, half: int | None) -> Llama:
    """Leave one of two processes its half of the heads and of the MLP; without ``half``, everything."""
    if half is not None:
        from lit_adapter.training.sharding import shard_heads  # brings Lightning

        shard_heads(model, SimpleNamespace(size=lambda: 2, get_local_rank=lambda: half))  # type: ignore[arg-type]
    return model


def transformers_llama(seed: int = 0, dtype: torch.dtype = torch.float64, **sizes: Any) -> Any:
    """A LlamaForCausalLM; its arguments are those of LlamaConfig, its rotary frequencies stay in fp32.

    transformers' norms compute in fp32 even in an fp64 model, so torch's norms replace them.
    """
    config = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "attn_implementation": "sdpa",
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, **sizes})).eval()
    randomise(model, seed)
    frequency = model.model.rotary_emb.inv_freq.clone()
    model = model.to(dtype)
    model.model.rotary_emb.inv_freq = frequency
    for layer in model.model.layers:
        layer.input_layernorm = _torch_norm(layer.input_layernorm)
        layer.post_attention_layernorm = _torch_norm(layer.post_attention_layernorm)
    model.model.norm = _torch_norm(model.model.norm)
    return model


def _torch_norm(norm: Any) -> torch.nn.RMSNorm:
    ours = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=norm.weight.dtype)
    ours.load_state_dict(norm.state_dict())
    return ours


def from_transformers(theirs: Any, dtype: torch.dtype = torch.float64) -> Llama:
    """Our model with their configuration and weights."""
    model = Llama(LlamaConfig.from_hf(theirs.config.to_dict()))
    state = {name.removeprefix("model."): tensor for name, tensor in theirs.state_dict().items()}
    frequency = model.inverse_frequency
    model = model.to(dtype)
    model.load_state_dict(state, strict=True)
    model.inverse_frequency = frequency
    return model.requires_grad_(False)


def random_ids(*shape: int, seed: int = 0, vocab: int = 61) -> Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def logits(model: Llama, ids: Tensor) -> Tensor:
    position = torch.arange(ids.shape[1]).expand_as(ids)
    return model.logits(model(ids, CausalView(model.rotation(position))))
