"""Bases and adapter files for the tests of other code bases' formats."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from convert_sources import write_tokenizer
from safetensors.torch import save_file
from torch import Tensor

from lit_adapter.model.adapter import attach, load_adapter_state
from lit_adapter.model.attention import CausalView
from lit_adapter.model.config import LlamaConfig
from lit_adapter.model.llama import Llama
from lit_adapter.weights.adapter_file import read_adapter
from lit_adapter.weights.convert import convert
from lit_adapter.weights.foreign.convert import ConversionOptions, convert_adapter

HERE = Path(__file__).parent / "adapters"
sys.path.insert(0, str(HERE))

from make import IDS, SIZES, base_tensors  # noqa: E402


def sizes(groups: int = 2, **changed: Any) -> dict[str, Any]:
    """``config.json`` of the base that the files in ``adapters/`` belong to."""
    about = {
        "model_type": "llama",
        "vocab_size": SIZES["vocab"],
        "num_hidden_layers": SIZES["layers"],
        "num_attention_heads": SIZES["heads"],
        "num_key_value_heads": groups,
        "hidden_size": SIZES["width"],
        "intermediate_size": SIZES["hidden"],
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
    }
    return {**about, **changed}


def write_base(folder: Path, groups: int = 2) -> Path:
    """That base, converted."""
    source = folder / f"source-{groups}"
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(sizes(groups)))
    write_tokenizer(source, SIZES["vocab"])
    state = {n if n == "lm_head.weight" else f"model.{n}": t.float() for n, t in base_tensors(groups).items()}
    save_file(state, source / "model.safetensors")
    return convert(source, folder / f"base-{groups}")


def logits_of(adapter: Path, groups: int, ids: list[int] = IDS) -> Tensor:
    """Our logits ``[T, V]`` of an adapter in our format, in fp64."""
    info, state = read_adapter(adapter)
    model = Llama(LlamaConfig.from_hf(sizes(groups)))
    model.load_state_dict(base_tensors(groups))
    model = model.requires_grad_(False).double()
    model.load_state_dict(base_tensors(groups))
    attach(model, info.adapter)
    load_adapter_state(model, state)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    with torch.no_grad():
        view = CausalView(model.rotation(torch.arange(len(ids))[None]))
        return model.logits(model(torch.tensor([ids]), view))[0]


def converted(source: Path, out: Path, base: Path | None, **options: Any) -> list[str]:
    """The report's lines."""
    return convert_adapter(source, out, ConversionOptions(base=base, **options))
