"""Hugging Face folders: ``config.json`` with safetensors or ``pytorch_model*.bin``, sharded or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.files.read import read_object
from lit_adapter.model.config import LlamaConfig
from lit_adapter.model.layout import base_shapes
from lit_adapter.weights.base_folder import (
    BIN,
    BIN_INDEX,
    CONFIG,
    GENERATION_CONFIG,
    WEIGHTS,
    WEIGHTS_INDEX,
)
from lit_adapter.weights.shards import SafetensorsShard, Shard, TorchShard, member
from lit_adapter.weights.source import Source, check_tensors, copy_tokenizer

OUTPUT_LAYER = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


class HuggingFaceSource(Source):
    """A folder as transformers writes it.

    Raises:
        UserError: another architecture, an unusable file, or tensors that do not fit ``config.json``.
    """

    format = "huggingface"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        raw = read_object(member(folder, CONFIG))
        self.config = LlamaConfig.from_hf(raw, source=str(folder / CONFIG))
        self.token_ids = _token_ids(raw, self.config.vocab_size, folder / CONFIG)
        if (folder / GENERATION_CONFIG).is_file():
            self.generation = read_object(member(folder, GENERATION_CONFIG))
        self._index, self._shard_of = _open_shards(folder)
        self._check_names()
        self.dtypes = {
            name: self._shard_of[name].dtypes[name] or torch.float32 for name in base_shapes(self.config)
        }

    def _check_names(self) -> None:
        shapes = {
            name: shard.shapes[name]
            for name, shard in self._shard_of.items()
            if not name.endswith("rotary_emb.inv_freq")  # in old checkpoints; follows from the configuration
        }
        if self.config.tie_embeddings and OUTPUT_LAYER in shapes and EMBEDDING in shapes:
            del shapes[OUTPUT_LAYER]
            output, embedding = self.tensor(OUTPUT_LAYER), self.tensor(EMBEDDING)
            if output.dtype != embedding.dtype or not torch.equal(output, embedding):
                raise UserError(
                    f"{self.label(OUTPUT_LAYER)} differs from the embedding, but {CONFIG} says "
                    "tie_word_embeddings; set it to false there to keep both"
                )
        check_tensors(shapes, {}, self.config, self._file_of, CONFIG)

    def _file_of(self, name: str) -> Path:
        return self._shard_of[name].path if name in self._shard_of else self._index

    def tensor(self, name: str) -> Tensor:
        """Return a tensor."""
        return self._shard_of[name].tensor(name)

    def label(self, name: str) -> str:
        """Return the file and the name."""
        return f"{self._file_of(name)}: tensor {name}"

    def write_tokenizer(self, out: Path) -> None:
        """Copy the tokenizer."""
        copy_tokenizer(self.folder, out)


def _open_shards(folder: Path) -> tuple[Path, dict[str, Shard]]:
    """Return the file that lists the tensors, and the shard of each of them."""
    kinds: tuple[type[Shard], ...] = (SafetensorsShard, TorchShard)
    for single, index, kind in zip((WEIGHTS, BIN), (WEIGHTS_INDEX, BIN_INDEX), kinds, strict=True):
        if (folder / single).is_file():
            shard = kind(member(folder, single))
            return shard.path, dict.fromkeys(shard.shapes, shard)
        if (folder / index).is_file():
            return _open_index(folder, index, kind)
    raise UserError(f"{folder}: no weights; expected {WEIGHTS}, {WEIGHTS_INDEX}, {BIN} or {BIN_INDEX} there")


def _open_index(folder: Path, index: str, kind: type[Shard]) -> tuple[Path, dict[str, Shard]]:
    path = member(folder, index)
    weight_map = read_object(path).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else []
    if not weight_map or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: no weight_map from tensors to file names")
    shard_of: dict[str, Shard] = {}
    for name in sorted(set(names)):
        try:
            shard = kind(member(folder, name))
        except UserError as error:
            raise UserError(f"{error} (listed in {path.name})") from None
        for tensor in shard.shapes:
            if tensor in shard_of:
                raise UserError(f"{shard.path}: tensor {tensor} is also in {shard_of[tensor].path.name}")
            shard_of[tensor] = shard
    for tensor, name in weight_map.items():
        if tensor not in shard_of or shard_of[tensor].path.name != name:
            raise UserError(f"{folder / name}: tensor {tensor} is missing, which {path.name} puts there")
    return path, shard_of


def _token_ids(raw: dict[str, Any], vocab_size: int, path: Path) -> dict[str, Any]:
    ids = {key: raw[key] for key in ("bos_token_id", "eos_token_id") if raw.get(key) is not None}
    for key, given in ids.items():
        for value in given if isinstance(given, list) else [given]:
            if not isinstance(value, int) or not 0 <= value < vocab_size:
                raise UserError(f"{path}: {key} is {value!r}; expected an id below vocab_size {vocab_size}")
    pad = raw.get("pad_token_id")
    # LLaMA 1 and 2 write -1 or an id beyond the vocabulary for "no padding token".
    if isinstance(pad, int) and 0 <= pad < vocab_size:
        ids["pad_token_id"] = pad
    return ids
