"""How the files of this folder were made: by the code bases themselves, on a tiny base of formulas.

    python make.py litgpt          with litgpt 0.5.4, the last that reads the prefix from the right rows
    python make.py litgpt-now      with litgpt 0.5.13
    python make.py lit-llama       with lit-llama's package on the path

Each run writes NAME.pth as the code base saves it, and into NAME.json the first of its own logits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
IDS = [3, 1, 4, 1, 5, 9, 2, 6]
SIZES = {"vocab": 260, "layers": 2, "heads": 4, "width": 16, "hidden": 24, "K": 3, "start": 1}


def wave(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers that depend on name and shape alone, the same on every machine."""
    phase = sum(name.encode()) % 97
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float64) * 1.7 + phase).sin().reshape(shape)


def base_tensors(groups: int) -> dict[str, Tensor]:
    """The base under our names, fp64 of fp32 numbers."""
    C, D = SIZES["width"], SIZES["width"] // SIZES["heads"]
    shapes = {"embed_tokens": (SIZES["vocab"], C), "lm_head": (SIZES["vocab"], C), "norm": (C,)}
    for layer in range(SIZES["layers"]):
        stem = f"layers.{layer}"
        shapes |= {
            f"{stem}.input_layernorm": (C,),
            f"{stem}.post_attention_layernorm": (C,),
            f"{stem}.self_attn.q_proj": (C, C),
            f"{stem}.self_attn.k_proj": (groups * D, C),
            f"{stem}.self_attn.v_proj": (groups * D, C),
            f"{stem}.self_attn.o_proj": (C, C),
            f"{stem}.mlp.gate_proj": (SIZES["hidden"], C),
            f"{stem}.mlp.up_proj": (SIZES["hidden"], C),
            f"{stem}.mlp.down_proj": (C, SIZES["hidden"]),
        }
    made = {f"{name}.weight": wave(name, shape) for name, shape in shapes.items()}
    sized = {n: 1 + 0.2 * t if t.ndim == 1 else t * (0.4 if "layers" in n else 1) for n, t in made.items()}
    return {name: tensor.float().double() for name, tensor in sized.items()}


def meta_rows(tensor: Tensor) -> Tensor:
    """Neighbouring rows rotate together: row i and row i + D/2 of a head become neighbours."""
    D = SIZES["width"] // SIZES["heads"]
    order = [h * D + i + j * D // 2 for h in range(len(tensor) // D) for i in range(D // 2) for j in (0, 1)]
    return tensor[order]


def fill(model: nn.Module, base: dict[str, Tensor], wanted: str) -> dict[str, Tensor]:
    """Give the model the base's weights and the adapter waves; return the adapter as it would be saved."""
    own, saved = model.state_dict(), {}
    for name, tensor in own.items():
        if any(part in name for part in wanted.split()):
            values = wave(name, tuple(tensor.shape)).float().double()
            values = 1 + 0.3 * values if name.endswith(("scale", "weight")) and "wte" not in name else values
            saved[name] = (0.6 * values if "gating" in name else values).float()
            own[name] = saved[name].double()
        else:
            own[name] = base[name.replace(".linear.", ".")]
    model.load_state_dict(own)
    return saved


def joint(base: dict[str, Tensor], layer: int, by_group: int, meta: bool) -> Tensor:
    q, k, v = (base[f"layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkv")
    if meta:
        q, k = meta_rows(q), meta_rows(k)
    if not by_group:
        return torch.cat([q, k, v])
    parts = zip(*(part.chunk(by_group) for part in (q, k, v)), strict=True)
    return torch.cat([rows for group in parts for rows in group])


def renamed(
    base: dict[str, Tensor], names: dict[str, str], fused: str, by_group: int, meta: bool
) -> dict[str, Tensor]:
    found = {
        "transformer.wte.weight": base["embed_tokens.weight"],
        "lm_head.weight": base["lm_head.weight"],
        names["norm"]: base["norm.weight"],
    }
    for layer in range(SIZES["layers"]):
        for ours, theirs in names.items():
            if ours != "norm":
                found[f"transformer.h.{layer}.{theirs}"] = base[f"layers.{layer}.{ours}.weight"]
        found[f"transformer.h.{layer}.{fused}.weight"] = joint(base, layer, by_group, meta)
    return found


def write(name: str, content: Any, logits: Tensor, groups: int) -> None:
    torch.save(content, HERE / f"{name}.pth")
    rows = [[float(f"{value:.12g}") for value in row] for row in logits[:, :12].tolist()]
    text = json.dumps({"groups": groups, "logits": rows})
    (HERE / f"{name}.json").write_text(text + "\n")


def litgpt(now: bool) -> None:
    from litgpt import adapter, adapter_v2

    for version, module in (("v1", adapter), ("v2", adapter_v2)):
        groups = 2
        config = module.Config(
            n_layer=SIZES["layers"],
            n_head=SIZES["heads"],
            n_query_groups=groups,
            n_embd=SIZES["width"],
            intermediate_size=SIZES["hidden"],
            vocab_size=SIZES["vocab"],
            padded_vocab_size=SIZES["vocab"],
            block_size=32,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            norm_eps=1e-5,
            mlp_class_name="LLaMAMLP",
            adapter_prompt_length=SIZES["K"],
            adapter_start_layer=SIZES["start"],
        )
        model = module.GPT(config).double()
        fused, names = (
            ("attn.qkv" if now else "attn.attn"),
            {
                "norm": "transformer.ln_f.weight",
                "input_layernorm": "norm_1.weight",
                "post_attention_layernorm": "norm_2.weight",
                "self_attn.o_proj": "attn.proj.weight",
                "mlp.gate_proj": "mlp.fc_1.weight",
                "mlp.up_proj": "mlp.fc_2.weight",
                "mlp.down_proj": "mlp.proj.weight",
            },
        )
        base = renamed(base_tensors(groups), names, fused, 0 if now else groups, meta=False)
        wanted = "adapter_wte gating_factor" + (" adapter_ norm_ ln_f" if version == "v2" else "")
        saved = fill(model, base, wanted)
        assert saved.keys() == {name for name in model.state_dict() if module.adapter_filter(name, None)}
        if now:  # its prefix reads wrong rows, so its logits are right only with closed gates
            closed = {n: t * ("gating" not in n) for n, t in model.state_dict().items()}
            model.load_state_dict(closed)
        with torch.no_grad():
            write(
                f"litgpt-{'0.5.13' if now else '0.5.4'}-{version}",
                {"model": saved},
                model(torch.tensor([IDS]))[0],
                groups,
            )


def lit_llama() -> None:
    import lit_llama.adapter
    import lit_llama.model
    from lit_llama.adapter_v2 import (
        adapter_v2_state_from_state_dict,
        add_adapter_v2_parameters_to_linear_layers,
    )

    lit_llama.model.find_multiple = lambda n, k: n
    for version in ("v1", "v2"):
        config = lit_llama.adapter.LLaMAConfig(
            block_size=32,
            vocab_size=SIZES["vocab"],
            padded_vocab_size=SIZES["vocab"],
            n_layer=SIZES["layers"],
            n_head=SIZES["heads"],
            n_embd=SIZES["width"],
            adapter_prompt_length=SIZES["K"],
            adapter_start_layer=SIZES["start"],
        )
        model = lit_llama.adapter.LLaMA(config)
        for block in model.transformer.h:  # its MLP has one width only, 8/3 C
            for name in ("c_fc1", "c_fc2"):
                setattr(block.mlp, name, nn.Linear(SIZES["width"], SIZES["hidden"], bias=False))
            block.mlp.c_proj = nn.Linear(SIZES["hidden"], SIZES["width"], bias=False)
        if version == "v2":
            add_adapter_v2_parameters_to_linear_layers(model)
        model = model.double()
        names = {
            "norm": "transformer.ln_f.scale",
            "input_layernorm": "rms_1.scale",
            "post_attention_layernorm": "rms_2.scale",
            "self_attn.o_proj": "attn.c_proj.weight",
            "mlp.gate_proj": "mlp.c_fc1.weight",
            "mlp.up_proj": "mlp.c_fc2.weight",
            "mlp.down_proj": "mlp.c_proj.weight",
        }
        base = renamed(base_tensors(SIZES["heads"]), names, "attn.c_attn", 0, meta=True)
        wanted = "adapter_wte gating_factor" + (" adapter_ rms_ ln_f" if version == "v2" else "")
        saved = fill(model, base, wanted)
        select = (
            adapter_v2_state_from_state_dict
            if version == "v2"
            else lit_llama.adapter.adapter_state_from_state_dict
        )
        assert saved.keys() == select(model.state_dict()).keys()
        with torch.no_grad():
            write(f"lit-llama-{version}", saved, model(torch.tensor([IDS]))[0], SIZES["heads"])


if __name__ == "__main__":
    {"litgpt": lambda: litgpt(False), "litgpt-now": lambda: litgpt(True), "lit-llama": lit_llama}[
        sys.argv[1]
    ]()
