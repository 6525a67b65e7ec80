"""GGUF files, in every type that the gguf package can dequantise.

llama.cpp keeps q and k rows in Meta's rotary order in some architectures (`META_ROWS`), and LLaMA 3's RoPE
scaling as a table of factors (`ROPE_TABLE`) instead of parameters. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.files.read import refuse_stand_in
from lit_adapter.model.config_keys import reading_sizes
from lit_adapter.model.precision import FLOATS
from lit_adapter.text.gguf_vocabulary import write_gguf_tokenizer
from lit_adapter.text.sentencepiece_model import CONTROL
from lit_adapter.weights.gguf_config import META_ROWS, ROPE_TABLE, GGUFKeys, config_of
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
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
STOPS = ("<|im_end|>", "<|endoftext|>")
"""Control tokens that end an answer in the files of Qwen and SmolLM3, which name only one of them."""
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
        keys = GGUFKeys(path, self.fields)
        self._has_meta_rows = keys.architecture in META_ROWS
        shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        with reading_sizes(str(self.path)):
            self.config = config_of(keys, shapes, self._rope_table())
        self._names = renamed(self.config, MODULES, "blk")
        shapes.pop(ROPE_TABLE, None)
        self._check_types()
        check_tensors(shapes, self._names, self.config, lambda _: path, "its keys")
        self.dtypes = {
            name: FLOATS.get(self._tensors[theirs].kind.name, torch.float32)
            for name, theirs in self._names.items()
        }
        self._read_token_ids()

    def _rope_table(self) -> NDArray[np.float32] | None:
        """Return LLaMA 3's factors of the rotary frequencies, if the file has them."""
        table = self._tensors.get(ROPE_TABLE)
        if table is None:
            return None
        if table.kind.name != "F32":
            raise UserError(f"{self.path}: tensor {ROPE_TABLE} is {table.kind.name}; expected F32")
        return np.frombuffer(read_bytes(self.path, table.start, table.n_bytes), "<f4")

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
            return self._reordered(name, plain)
        n_rows = math.prod(shape[:-1])
        packed = np.frombuffer(content, np.uint8).reshape(n_rows, -1)
        expanded = np.empty((n_rows, shape[-1]), np.float32)
        for start in range(0, n_rows, ROWS):
            block = slice(start, start + ROWS)
            expanded[block] = gguf.quants.dequantize(packed[block], tensor.kind)
        return self._reordered(name, torch.from_numpy(expanded).view(shape))

    def _reordered(self, name: str, tensor: Tensor) -> Tensor:
        return half_split(name, tensor, self.config) if self._has_meta_rows else tensor

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
        named = [ids.get("eos_token_id"), self.fields.get("tokenizer.ggml.eot_token_id")]
        stops = list(dict.fromkeys(id_ for id_ in (*named, *self._spelled_stops()) if id_ is not None))
        if stops and stops != [ids.get("eos_token_id")]:
            self.generation = {**ids, "eos_token_id": stops}

    def _spelled_stops(self) -> list[int]:
        """Return the ids of `STOPS`; none for the architecture ``llama``, whose files name their own."""
        if self.config.family in ("llama", "mistral"):
            return []
        tokens, kinds = (self.fields.get(f"tokenizer.ggml.{key}") or [] for key in ("tokens", "token_type"))
        numbered = enumerate(zip(tokens, kinds, strict=False))
        return [id_ for id_, (text, kind) in numbered if kind == CONTROL and text in STOPS]
