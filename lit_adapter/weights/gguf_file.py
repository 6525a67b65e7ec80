"""GGUF files of the architecture ``llama``, in every type that the gguf package can dequantise.

llama.cpp keeps q and k rows in Meta's rotary order, and LLaMA 3's RoPE scaling as a table of factors
(`rope_freqs.weight`) instead of parameters. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.files.read import refuse_stand_in
from lit_adapter.model.config import LlamaConfig
from lit_adapter.model.config_keys import reading_sizes
from lit_adapter.model.precision import FLOATS
from lit_adapter.model.rope import inverse_frequencies
from lit_adapter.model.rope_config import RopeConfig
from lit_adapter.text.gguf_vocabulary import write_gguf_tokenizer
from lit_adapter.weights.gguf_header import read_header
from lit_adapter.weights.shards import AGAIN, read_bytes
from lit_adapter.weights.source import Source, check_tensors, half_split, renamed

MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ROPE_TABLE = "rope_freqs.weight"
ROWS = 1024
"""Quantised rows that are dequantised at a time."""


class GGUFSource(Source):
    """One GGUF file.

    F32, F16 and BF16 keep their type; quantised types become float32, which holds their values exactly.

    Raises:
        UserError: another architecture, an unknown type, a damaged file, or tensors that do not fit its keys.
    """

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_stand_in(path)
        self.fields, tensors = read_header(path)
        self._tensors = {tensor.name: tensor for tensor in tensors}
        if len(self._tensors) < len(tensors):
            raise UserError(f"{path}: a tensor appears twice; {AGAIN}")
        self._check_keys()
        shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        with reading_sizes(str(self.path)):
            self.config = self._config(shapes)
        self._names = renamed(self.config, MODULES, "blk")
        shapes.pop(ROPE_TABLE, None)
        self._check_types()
        check_tensors(shapes, self._names, self.config, lambda _: path, "its keys")
        self.dtypes = {
            name: FLOATS.get(self._tensors[theirs].kind.name, torch.float32)
            for name, theirs in self._names.items()
        }
        self._read_token_ids()

    def _check_keys(self) -> None:
        architecture = self.fields.get("general.architecture")
        if architecture != "llama":
            raise UserError(
                f"{self.path}: general.architecture is {architecture!r}; only 'llama' can be adapted"
            )
        if self.fields.get("split.count", 1) > 1:
            raise UserError(f"{self.path}: one of {self.fields['split.count']} shards; merge them first")
        if self.fields.get("llama.expert_count", 0) > 0:
            raise UserError(f"{self.path}: a mixture of experts; only plain LLaMA models can be adapted")

    def _key(self, name: str) -> Any:
        if self.fields.get(f"llama.{name}") is None:
            raise UserError(f"{self.path}: key 'llama.{name}' is missing")
        return self.fields[f"llama.{name}"]

    def _config(self, shapes: dict[str, tuple[int, ...]]) -> LlamaConfig:
        get = self.fields.get
        n_embd, n_head = self._key("embedding_length"), self._key("attention.head_count")
        embedding = shapes.get("token_embd.weight", ())
        if len(embedding) != 2:
            raise UserError(f"{self.path}: tensor token_embd.weight is missing or not a matrix")
        n_kv_head = get("llama.attention.head_count_kv", n_head)
        if not isinstance(n_head, int) or not isinstance(n_kv_head, int):
            raise UserError(f"{self.path}: layers differ in their number of heads; a LLaMA's do not")
        head_dim = get("llama.attention.key_length") or n_embd // max(n_head, 1)
        for other in ("attention.value_length", "rope.dimension_count"):
            if get(f"llama.{other}", head_dim) != head_dim:
                raise UserError(
                    f"{self.path}: key 'llama.{other}' is {self._key(other)}; expected {head_dim}"
                )
        return LlamaConfig(
            vocab_size=embedding[0],
            n_layer=self._key("block_count"),
            n_head=n_head,
            n_kv_head=n_kv_head,
            n_embd=n_embd,
            head_dim=head_dim,
            n_hidden=self._key("feed_forward_length"),
            norm_eps=_float32(self._key("attention.layer_norm_rms_epsilon")),
            context_length=self._key("context_length"),
            rope=self._rope(head_dim),
            tie_embeddings="output.weight" not in shapes,
            attention_bias="blk.0.attn_q.bias" in shapes,
            mlp_bias="blk.0.ffn_up.bias" in shapes,
        )

    def _rope(self, head_dim: int) -> RopeConfig:
        get = self.fields.get
        theta = _float32(get("llama.rope.freq_base", 10_000.0))
        kind = get("llama.rope.scaling.type", "none")
        factor = float(get("llama.rope.scaling.factor") or get("llama.rope.scale_linear") or 1.0)
        if kind not in ("none", "linear"):
            raise UserError(
                f"{self.path}: key 'llama.rope.scaling.type' is '{kind}'; expected none or linear"
            )
        table = self._tensors.get(ROPE_TABLE)
        if table is None:
            return RopeConfig(theta, "linear", factor) if factor != 1 else RopeConfig(theta)
        if table.kind.name != "F32" or math.prod(table.shape) != head_dim // 2 or factor != 1:
            raise UserError(
                f"{self.path}: tensor {ROPE_TABLE}: expected {head_dim // 2} float32 values and no factor"
            )
        given = np.frombuffer(read_bytes(self.path, table.start, table.n_bytes), "<f4")
        if np.array_equal(given, np.ones_like(given)):
            return RopeConfig(theta)
        original = int(get("llama.rope.scaling.original_context_length") or 8192)
        rope = RopeConfig(theta, "llama3", float(given.max()), 1.0, 4.0, original)
        plain, scaled = (inverse_frequencies(one, head_dim).numpy() for one in (RopeConfig(theta), rope))
        if not np.allclose(given, plain / scaled, rtol=1e-4):
            raise UserError(
                f"{self.path}: tensor {ROPE_TABLE} follows no LLaMA 3 scaling of factor {rope.factor:g}; "
                "convert the original checkpoint"
            )
        return rope

    def _check_types(self) -> None:
        import gguf

        for name, tensor in self._tensors.items():
            kind = tensor.kind
            try:
                # One block of zeros tells whether the package can expand the type, without reading any.
                gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except NotImplementedError:
                raise UserError(
                    f"{self.path}: tensor {name} is of type {kind.name}, which cannot be expanded; "
                    "use another quantisation of this model"
                ) from None

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, dequantised, with q and k rows in Hugging Face's order."""
        import gguf

        tensor = self._tensors[self._names[name]]
        shape = tensor.shape
        content = read_bytes(self.path, tensor.start, tensor.n_bytes)
        if tensor.kind.name in FLOATS:
            plain = torch.frombuffer(content, dtype=FLOATS[tensor.kind.name]).view(shape)
            return half_split(name, plain, self.config)
        n_rows = math.prod(shape[:-1])
        packed = np.frombuffer(content, np.uint8).reshape(n_rows, -1)
        expanded = np.empty((n_rows, shape[-1]), np.float32)
        for start in range(0, n_rows, ROWS):
            block = slice(start, start + ROWS)
            expanded[block] = gguf.quants.dequantize(packed[block], tensor.kind)
        return half_split(name, torch.from_numpy(expanded).view(shape), self.config)

    def label(self, name: str) -> str:
        """Return the file and GGUF's name."""
        return f"{self.path}: tensor {self._names[name]}"

    def write_tokenizer(self, out: Path) -> None:
        """Write the vocabulary that the file holds as tokenizer files."""
        if "tokenizer.ggml.tokens" not in self.fields:
            raise UserError(f"{self.path}: no tokenizer; key 'tokenizer.ggml.tokens' is missing")
        write_gguf_tokenizer(self.fields, out)

    def _read_token_ids(self) -> None:
        ids = {
            f"{kind}_token_id": self.fields[f"tokenizer.ggml.{name}_token_id"]
            for kind, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
            if f"tokenizer.ggml.{name}_token_id" in self.fields
        }
        for key, value in ids.items():
            if not 0 <= value < self.config.vocab_size:
                raise UserError(f"{self.path}: {key} is {value}; expected below {self.config.vocab_size}")
        self.token_ids = ids
        end_of_turn = self.fields.get("tokenizer.ggml.eot_token_id")
        if end_of_turn is not None and end_of_turn != ids.get("eos_token_id"):
            stops = [value for value in (ids.get("eos_token_id"), end_of_turn) if value is not None]
            self.generation = {**ids, "eos_token_id": stops}


def _float32(value: float) -> float:
    """Return the shortest number that rounds to a stored float32: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
