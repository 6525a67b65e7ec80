"""Compares the fused executor with the modules in Triton's interpreter, which needs no GPU.

    TRITON_INTERPRET=1 python tests/interpreted.py

The interpreter multiplies bf16 unlike a GPU, so everything is in fp32, and fp8 without its rounding. Each
line has a form of the adapter, whether the base is scaled as for fp8, whether blocks are recomputed, and the
relative error of all gradients together.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from dropped import Dropped, dropping
from random_records import encoded
from tiny_models import open_adapter, random_llama
from torch import Tensor

from lit_adapter.data.packing import Packer, shared_preambles
from lit_adapter.model import matrices
from lit_adapter.model.adapter import adapter_parameters
from lit_adapter.model.attention import PackedRow, SegmentView
from lit_adapter.model.block_weights import join_groups, keep_float8
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.fused import FusedView
from lit_adapter.model.layout import block_layout
from lit_adapter.model.llama import Llama
from lit_adapter.model.lora_config import LoraConfig
from lit_adapter.model.loss import target_loss
from lit_adapter.model.rope_config import RopeConfig

FORMS = {
    "prefix": AdapterConfig(prompt_length=5, gate="tanh", norms=False),
    "lora": AdapterConfig(prompt_length=0, lora=LoraConfig(rank=3)),
    "mixed": AdapterConfig(
        prompt_length=4, layers=1, gate="token", norms=True, lora=LoraConfig(rank=2, on=("v_proj", "mlp"))
    ),
    "v2": AdapterConfig(prompt_length=4, layers=1, version="v2"),
    "v2 of a base with norms of heads": AdapterConfig(prompt_length=0, version="v2"),
    "dropped": AdapterConfig(
        prompt_length=5,
        layers=1,
        gate="tanh",
        prefix_query="unrotated",
        dropout=0.3,
        lora=LoraConfig(rank=3, dropout=0.2),
    ),
    "dropped prefix": AdapterConfig(prompt_length=5, dropout=0.3),
}
BESIDE_FLOAT8 = ("prefix", "lora", "mixed")
YARN = RopeConfig(kind="yarn", factor=4.0, original_context_length=64, attention_factor=1.3)
SIZES = {"n_embd": 64, "n_hidden": 48, "n_head": 4, "head_dim": 16, "n_layer": 2, "rope": YARN}


def without_a_device() -> None:
    """Answer what the kernels' callers ask of a device, and keep scaled numbers in fp32."""
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    of_device = SimpleNamespace(multi_processor_count=2, shared_memory_per_block_optin=100_000)
    torch.cuda.get_device_properties = lambda *_: of_device
    torch.float8_e4m3fn = torch.float32
    matrices._product = lambda x, matrix, scale: (x.data * x.scale) @ (matrix * scale.T).T


def gradients(model: Llama, row: PackedRow, view: Any) -> dict[str, Tensor]:
    hidden = model(row.ids[None], view, row.target_index)[0]
    names, parameters = zip(*adapter_parameters(model), strict=True)
    found = torch.autograd.grad(target_loss(hidden, model.lm_head.weight, row.target_id), parameters)
    return dict(zip(names, (gradient.double() for gradient in found), strict=True))


def compare(form: str, *, float8: bool) -> None:
    """Print the error of one form, with recomputation and without."""
    sizes = SIZES | {"head_norms": "norms of heads" in form}
    model = open_adapter(random_llama(3, torch.float32, **sizes), FORMS[form], seed=4)
    join_groups(model)
    data = encoded(4, 4, cut=True, longest=12)
    row = Packer(data, shared_preambles(data), mask_prompt=True, row_tokens=500).row([0, 1, 2, 3])
    rotation = model.rotation(row.position[None])
    torch.manual_seed(5)
    seeds = FusedView(model, row, rotation).seeds
    with dropping(Dropped(model, row, seeds)):
        wanted = gradients(model, row, SegmentView(row, rotation))
    if float8:
        for block in model.layers:
            block.fused_weights = keep_float8(block, block_layout(model.config))
    for recompute in (False, True):
        torch.manual_seed(5)
        found = gradients(model, row, FusedView(model, row, rotation, recompute=recompute))
        difference = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
        error = (difference / sum(float(g.square().sum()) for g in wanted.values())) ** 0.5
        print(form, "fp8" if float8 else "full", "recomputed" if recompute else "kept", error)


if __name__ == "__main__":
    without_a_device()
    for form in FORMS:
        compare(form, float8=False)
        if form in BESIDE_FLOAT8:
            compare(form, float8=True)
