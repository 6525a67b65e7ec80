"""What distinguishes models that are similar to a family: one phrase each, for the line that refuses them."""

from __future__ import annotations

_EXPERTS = "a mixture of experts in place of the MLP"
_GEMMA = "norms that multiply by 1 + w, scaled embeddings and GELU"
_GRANITE = "multipliers on embeddings, residuals, scores and logits"
_LATENT = "keys and values compressed to a latent vector, and a mixture of experts"
_IMAGES = "a tower for images and rotary positions in several dimensions"

RELATIVES = {
    "gemma": _GEMMA,
    "gemma2": f"{_GEMMA}, four norms a layer and soft caps on logits",
    "gemma3": f"{_GEMMA}, four norms a layer and two bases of rotary positions",
    "gemma3_text": f"{_GEMMA}, four norms a layer and two bases of rotary positions",
    "phi": "attention and MLP side by side, layer norms and partial rotary positions",
    "phi2": "attention and MLP side by side, layer norms and partial rotary positions",
    "phi3": "joined matrices and rotary positions of kind longrope",
    "phimoe": _EXPERTS,
    "olmo": "layer norms without weights and clipped queries, keys and values",
    "olmo2": "norms behind attention and MLP, and norms over all heads together",
    "olmo3": "norms behind attention and MLP, and norms over all heads together",
    "olmoe": _EXPERTS,
    "granite": _GRANITE,
    "granitemoe": f"{_EXPERTS}, and {_GRANITE}",
    "granitemoehybrid": f"state-space layers and {_GRANITE}",
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen2moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "qwen3moe": _EXPERTS,
    "qwen3_next": "layers of linear attention and a mixture of experts",
    "qwen2_vl": _IMAGES,
    "qwen2_5_vl": _IMAGES,
    "qwen3_vl": _IMAGES,
    "mistral3": "a tower for images",
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek2": _LATENT,
    "gpt_oss": "a mixture of experts and sinks in attention",
    "gpt-oss": "a mixture of experts and sinks in attention",
    "llama4": "a mixture of experts and attention in chunks",
    "llama4_text": "a mixture of experts and attention in chunks",
    "mllama": "layers of attention to images",
    "cohere": "attention and MLP side by side, layer norms and scaled logits",
    "cohere2": "attention and MLP side by side, layer norms and scaled logits",
    "command-r": "attention and MLP side by side, layer norms and scaled logits",
    "starcoder2": "layer norms and an MLP of two matrices with GELU",
    "stablelm": "layer norms and partial rotary positions",
    "glm4": "four norms a layer and partial rotary positions",
    "exaone4": "norms behind attention and MLP",
    "gpt_neox": "layer norms, and attention and MLP side by side",
    "gptneox": "layer norms, and attention and MLP side by side",
    "nemotron": "layer norms and an MLP with squared ReLU",
}
"""By `model_type` of Hugging Face or by `general.architecture` of GGUF."""
