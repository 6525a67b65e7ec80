"""Checkpoints of other code bases, written here from a random transformers model, for the convert tests."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 512
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
META_LAYER = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
GGUF_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


def random_llama(dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes}))
    for parameter in model.parameters():  # norms and biases that differ from 1 and 0
        torch.nn.init.normal_(parameter, 0.1 if parameter.ndim == 1 else 0.0, 0.05)
    return model.to(dtype).eval()


def write_tokenizer(folder: Path, size: int = VOCAB) -> None:
    """Every byte, and enough added control tokens to fill ``size`` ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<s>", "</s>", *(f"<extra_{i}>" for i in range(size - len(alphabet) - 2))])
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


def write_hf(model: LlamaForCausalLM, folder: Path, layout: str = "single") -> Path:
    """``layout``: single, sharded, bin or bin-sharded."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 258]}))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    write_tokenizer(folder)
    suffix, save = ("bin", torch.save) if layout.startswith("bin") else ("safetensors", save_file)
    stem = "pytorch_model" if suffix == "bin" else "model"
    if not layout.endswith("sharded"):
        save(state, folder / f"{stem}.{suffix}")
        return folder
    weight_map = {}
    for number, names in enumerate(np.array_split(sorted(state), 3), start=1):
        shard = f"{stem}-{number:05}-of-00003.{suffix}"
        save({str(name): state[str(name)] for name in names}, folder / shard)
        weight_map |= dict.fromkeys(map(str, names), shard)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def interleaved(tensor: torch.Tensor, n_head: int) -> torch.Tensor:
    """Rows in Meta's order: within a head, rows i and i + D/2 of Hugging Face become neighbours."""
    head_dim = tensor.shape[0] // n_head
    rows = []
    for head in range(n_head):
        for i in range(head_dim // 2):
            rows += [head * head_dim + i, head * head_dim + i + head_dim // 2]
    return tensor[rows]


def meta_state(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    state, config = model.state_dict(), model.config
    out = {
        "tok_embeddings.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
        "rope.freqs": torch.ones(8),
    }
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for ours, theirs in META_LAYER.items():
            tensor = state[f"model.layers.{layer}.{ours}.weight"]
            tensor = interleaved(tensor, heads[ours]) if ours in heads else tensor
            out[f"layers.{layer}.{theirs}.weight"] = tensor
    return {name: tensor.clone() for name, tensor in out.items()}


def write_meta(model: LlamaForCausalLM, folder: Path, ranks: int = 1, vocabulary_cut: bool = False) -> Path:
    """Meta's shards as its parallel layers cut them; ``vocabulary_cut`` as LLaMA 3 does."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "vocab_size": -1,
    }
    (folder / "params.json").write_text(json.dumps(params))
    columns = ["wo.weight", "w2.weight"] + ([] if vocabulary_cut else ["tok_embeddings.weight"])
    for rank in range(ranks):
        shard = {}
        for name, tensor in meta_state(model).items():
            dim = 1 if name.endswith(tuple(columns)) else 0
            shard[name] = tensor if tensor.ndim == 1 else tensor.chunk(ranks, dim)[rank].clone()
        torch.save(shard, folder / f"consolidated.{rank:02}.pth")
    ranks_text = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))
    (folder / "tokenizer.model").write_text(ranks_text)
    return folder


def write_gguf(
    model: LlamaForCausalLM,
    path: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    rope_freqs: np.ndarray | None = None,
    changes: dict[str, np.ndarray | None] | None = None,
    tokens: bool = True,
    architecture: str = "llama",
    pre: str = "smollm",
    control: Sequence[str] = ("<s>", "</s>"),
) -> dict[str, torch.Tensor]:
    """Write a GGUF file and return the values it holds, under Hugging Face's names.

    Matrices get ``kind``, vectors stay F32, as llama.cpp does.
    """
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope, head_dim = config.rope_parameters, state["model.layers.0.self_attn.q_proj.weight"].shape[0]
    head_dim //= config.num_attention_heads
    writer.add_rope_freq_base(rope["rope_theta"])
    if head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if tokens:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        control = [*control, *(f"<extra_{i}>" for i in range(VOCAB - 257 - len(control)))]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list([*alphabet, *control, "ab"])
        writer.add_token_types([1] * 256 + [3] * len(control) + [1])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(256)
        writer.add_eos_token_id(257)
    held = {}
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if architecture.startswith("qwen"):
        heads = {}  # their rows keep Hugging Face's order
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, part = name.rpartition(".")
        if module.startswith("model.layers."):
            _, _, layer, inner = module.split(".", 3)
            theirs = f"blk.{layer}.{GGUF_LAYER[inner]}.{part}"
        else:
            theirs = f"{names[module]}.{part}"
        used = kind if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        head = heads.get(module.rpartition(".")[2])
        held[name] = _stored(tensor, used)
        rows = interleaved(tensor, head) if head else tensor
        data = gguf.quants.quantize(rows.float().numpy(), used)
        if changes and theirs in changes:
            if changes[theirs] is None:
                continue
            packed = changes[theirs].dtype == np.uint8
            raw = gguf.GGMLQuantizationType.Q8_K if packed else None
            writer.add_tensor(theirs, changes[theirs], raw_dtype=raw)
        else:
            writer.add_tensor(theirs, data, raw_dtype=used)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
    for name, data in (changes or {}).items():
        if data is not None and name.startswith("extra."):
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def _stored(tensor: torch.Tensor, kind: gguf.GGMLQuantizationType) -> torch.Tensor:
    """What a file of this kind holds of a tensor: rows are quantised on their own, so order is no matter."""
    packed = gguf.quants.quantize(tensor.float().numpy(), kind)
    values = torch.from_numpy(np.array(gguf.quants.dequantize(packed, kind))).view(tensor.shape)
    plain = {"F16": torch.float16, "BF16": torch.bfloat16}
    return values.to(plain.get(kind.name, torch.float32))
