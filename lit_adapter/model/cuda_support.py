"""Which models the CUDA executors can compute. Needs no Triton: a run can be planned without a GPU."""

from __future__ import annotations

import torch

from lit_adapter.model import survey
from lit_adapter.model.adapter import trained_modules
from lit_adapter.model.affine import AdaptedLinear, AdaptedNorm
from lit_adapter.model.executors import Setting
from lit_adapter.model.llama import Llama
from lit_adapter.model.lora import LoraLinear
from lit_adapter.model.matrices import Float8Linear
from lit_adapter.model.prefix import GatedPrefix
from lit_adapter.model.tiles import HEAD_SIZES, LONGEST_PROMPT

KNOWN = survey.FROZEN | {GatedPrefix, AdaptedNorm, AdaptedLinear, Float8Linear, LoraLinear}


def unsupported(model: Llama, setting: Setting) -> str | None:
    """Return why the kernels cannot compute ``model``; None where they can."""
    config, dtype = model.config, str(setting.dtype).removeprefix("torch.")
    prefixes = [block.self_attn.prefix for block in model.layers if block.self_attn.prefix is not None]
    trained = [module for _, module in trained_modules(model)]
    reasons = (
        (setting.dtype not in (torch.bfloat16, torch.float16), f"the base is in {dtype}, not bfloat16"),
        (torch.is_autocast_enabled(), "precision is mixed"),
        (config.head_dim not in HEAD_SIZES, f"the attention heads have {config.head_dim} channels"),
        (any(len(prefix.prompt) > LONGEST_PROMPT for prefix in prefixes), f"K is above {LONGEST_PROMPT}"),
        (not all(module.active for module in trained), "the adapter is switched off"),
    )
    why = next((why for applies, why in reasons if applies), None)
    why = why or survey.obstacle(model, KNOWN, frozen=True)
    if why is None:
        return None
    others = dict.fromkeys(module.part for module in trained if type(module) not in KNOWN)
    return f"the adapter trains {' and '.join(others)}" if others else why
