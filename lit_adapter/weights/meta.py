"""Meta's folders: ``params.json`` and one ``consolidated.NN.pth`` for each tensor-parallel rank."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.files.read import read_object
from lit_adapter.model.config import LlamaConfig
from lit_adapter.weights.shards import TorchShard, member
from lit_adapter.weights.source import Source, check_tensors, copy_tokenizer, half_split, renamed

PARAMS = "params.json"
MODULES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
SHARDED_BY_INPUTS = tuple(f".{MODULES[name]}.weight" for name in ("self_attn.o_proj", "mlp.down_proj"))
"""Matrices of which every rank holds some columns; of the others it holds some rows."""


class MetaSource(Source):
    """A folder as Meta ships it; a UserError names what is absent, damaged or of other sizes."""

    format = "meta"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = member(folder, PARAMS)
        params = read_object(path)
        for key in ("quantization_args", "lora_args", "moe_args"):
            if params.get(key):
                raise UserError(f"{path}: key '{key}': only plain LLaMA checkpoints can be converted")
        self.shards = _open_shards(folder)
        self._check_count(params, path)
        self._dims = {name: self._sharded_dim(name, params["dim"]) for name in self.shards[0].shapes}
        shapes = {name: self._whole_shape(name) for name in self._dims if name != "rope.freqs"}
        for name in ("output.weight", "layers.0.feed_forward.w1.weight"):
            if len(shapes.get(name, ())) != 2:
                raise UserError(f"{self.shards[0].path}: tensor {name} is missing or not a matrix")
        self.config = LlamaConfig.from_meta(
            params,
            vocab_size=shapes["output.weight"][0],
            n_hidden=shapes["layers.0.feed_forward.w1.weight"][0],
            source=str(path),
        )
        self._names = renamed(self.config, MODULES, "layers")
        check_tensors(shapes, self._names, self.config, lambda _: self.shards[0].path, PARAMS)
        self.dtypes = {
            name: self.shards[0].dtypes[theirs] or torch.float32 for name, theirs in self._names.items()
        }
        self._read_token_ids()

    def _check_count(self, params: dict[str, object], path: Path) -> None:
        """Compare the number of files with the number of ranks that a query matrix's rows imply."""
        first, dim = self.shards[0], params.get("dim")
        shape = first.shapes.get("layers.0.attention.wq.weight", ())
        if not isinstance(dim, int) or len(shape) != 2 or not shape[0] or dim % shape[0]:
            raise UserError(
                f"{first.path}: tensor layers.0.attention.wq.weight has shape {list(shape)}; "
                f"expected a number of rows that divides {path.name}'s dim {dim}"
            )
        if dim // shape[0] != len(self.shards):
            raise UserError(
                f"{self.folder}: the model is sharded into {dim // shape[0]} files consolidated.*.pth, "
                f"but {len(self.shards)} are there"
            )
        for shard in self.shards[1:]:
            odd = shard.shapes.keys() ^ first.shapes.keys()
            if odd:
                both = f"both this file and {first.path.name}"
                raise UserError(f"{shard.path}: tensor {min(odd)} is not in {both}")

    def _sharded_dim(self, name: str, dim: int) -> int | None:
        """Return along which dimension a tensor is sharded, or None if every rank holds it whole."""
        shape = self.shards[0].shapes[name]
        if len(self.shards) == 1 or len(shape) < 2:
            return None
        if name == "tok_embeddings.weight":
            return 0 if shape[1] == dim else 1  # LLaMA 3 shards the vocabulary, LLaMA 1 and 2 the width
        return 1 if name.endswith(SHARDED_BY_INPUTS) else 0

    def _whole_shape(self, name: str) -> tuple[int, ...]:
        first = self.shards[0]
        shape, dim = first.shapes[name], self._dims[name]
        for shard in self.shards[1:]:
            if shard.shapes[name] != shape:
                raise UserError(
                    f"{shard.path}: tensor {name} has shape {list(shard.shapes[name])}, "
                    f"but {list(shape)} in {first.path.name}"
                )
        return tuple(size * len(self.shards) if i == dim else size for i, size in enumerate(shape))

    def tensor(self, name: str) -> Tensor:
        """Return a tensor joined from all ranks, with q and k rows in Hugging Face's order."""
        theirs = self._names[name]
        dim = self._dims[theirs]
        if dim is None:
            return half_split(name, self.shards[0].tensor(theirs), self.config)
        joined = torch.cat([shard.tensor(theirs) for shard in self.shards], dim)
        return half_split(name, joined, self.config)

    def label(self, name: str) -> str:
        """Return the file and Meta's name."""
        return f"{self.shards[0].path}: tensor {self._names[name]}"

    def _tokenizer_folder(self) -> Path:
        for folder in (self.folder, self.folder.absolute().parent):
            if (folder / "tokenizer.model").is_file():
                return folder
        raise UserError(f"{self.folder}: no tokenizer.model there or in the folder above")

    def write_tokenizer(self, out: Path) -> None:
        """Copy ``tokenizer.model`` from the folder or, as in LLaMA 1 and 2, the one above."""
        copy_tokenizer(self._tokenizer_folder(), out)

    def _read_token_ids(self) -> None:
        """Read BOS and EOS from the tokenizer, the only file of Meta's that has them."""
        path = self._tokenizer_folder() / "tokenizer.model"
        n_ranks = _count_ranks(path)
        if n_ranks is None:
            self.token_ids = _sentencepiece_ids(path)
            return
        # LLaMA 3 appends its control tokens to the ranks in a fixed order.
        end_of_text, end_of_turn = n_ranks + 1, n_ranks + 9
        self.token_ids = {"bos_token_id": n_ranks, "eos_token_id": end_of_text}
        self.generation = {"bos_token_id": n_ranks, "eos_token_id": [end_of_text, end_of_turn]}


def _open_shards(folder: Path) -> list[TorchShard]:
    names = sorted(path.name for path in folder.glob("consolidated.*.pth"))
    for number, name in enumerate(names):
        expected = f"consolidated.{number:02}.pth"
        if name != expected:
            raise UserError(f"{folder / expected}: file not found, but {name} is there")
    if not names:
        raise UserError(f"{folder}: no consolidated.00.pth beside {PARAMS}")
    return [TorchShard(member(folder, name)) for name in names]


def _count_ranks(path: Path) -> int | None:
    """Return how many ranks a LLaMA 3 tokenizer lists, or None for a sentencepiece model."""
    with path.open("rb") as stream:
        lines = [line.split() for line in stream]
    return len(lines) if all(len(parts) == 2 and parts[1].isdigit() for parts in lines) else None


def _sentencepiece_ids(path: Path) -> dict[str, int]:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: neither a sentencepiece model nor a list of ranks: {error}") from None
    return {"bos_token_id": model.bos_id(), "eos_token_id": model.eos_id()}
