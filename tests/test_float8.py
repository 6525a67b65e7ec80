"""Bases in fp8 as the modules compute them, with LoRA beside them; the kernels are in `test_fused`."""

from __future__ import annotations

import pytest
import torch
from random_records import encoded
from tiny_models import open_adapter, random_llama
from torch import Tensor

from lit_adapter.data.packing import Packer, shared_preambles
from lit_adapter.errors import UserError
from lit_adapter.model.adapter import adapter_parameters, adapter_state
from lit_adapter.model.block_weights import keep_float8, prepare
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.cuda_support import unsupported
from lit_adapter.model.executors import Executor, Setting
from lit_adapter.model.layout import block_layout
from lit_adapter.model.llama import Llama
from lit_adapter.model.lora import LoraLinear
from lit_adapter.model.lora_config import LoraConfig
from lit_adapter.model.loss import row_loss
from lit_adapter.model.matrices import Float8Matrix, float8_linear

FORMS = {
    "prefix": AdapterConfig(prompt_length=5),
    "LoRA": AdapterConfig(prompt_length=0, lora=LoraConfig(rank=3)),
    "both": AdapterConfig(
        prompt_length=5, layers=2, norms=True, lora=LoraConfig(rank=2, on=("v_proj", "mlp"))
    ),
}
SIZES = {"n_embd": 96, "n_hidden": 80, "n_head": 4, "head_dim": 16, "attention_bias": True, "mlp_bias": True}


def rounded(x: Tensor) -> Tensor:
    """Each row scaled so that its largest number is 448, in numbers with three bits of mantissa; fp64."""
    scale = x.double().abs().amax(1, keepdim=True) / 448
    return (x.double() / scale).float().to(torch.float8_e4m3fn).double() * scale


def test_a_product_and_its_gradient_are_those_of_rounded_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x, dy = (
        torch.randn(*shape, generator=generator).bfloat16() for shape in ((160, 96), (37, 96), (37, 160))
    )
    bias = torch.randn(160, generator=generator).bfloat16()
    x.requires_grad_()
    y = float8_linear(x[None], Float8Matrix.of(weight, bias))[0]
    wanted = rounded(x.detach()) @ rounded(weight).T + bias.double()
    assert (y.double() - wanted).norm() / wanted.norm() < 0.004  # of bf16
    (dx,) = torch.autograd.grad(y, x, dy)
    wanted = rounded(dy) @ rounded(weight.T).T
    assert (dx.double() - wanted).norm() / wanted.norm() < 0.004


def test_the_update_is_computed_beside_the_rounded_layer_and_not_rounded() -> None:
    linear = torch.nn.Linear(32, 48, bias=True, dtype=torch.bfloat16)
    layer = LoraLinear(linear, LoraConfig(rank=4), "outputs")
    torch.nn.init.normal_(layer.lora_a)
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(7, 32).bfloat16()
    update = layer(x).double() - linear(x).double()
    layer.keep_float8(matrix := Float8Matrix.of(linear.weight.detach(), linear.bias.detach()))
    found = layer(x).double() - float8_linear(x, matrix).double()
    assert (found - update).norm() / update.norm() < 0.02
    exact = 2 * (x.double() @ layer.lora_a.double().T) @ layer.lora_b.double().T
    assert (found - exact).norm() / exact.norm() < 0.02


def model_of(form: str, *, float8: bool) -> Llama:
    model = random_llama(3, torch.bfloat16, **SIZES)
    open_adapter(model, FORMS[form], seed=4)
    if float8:
        for block in model.layers:
            block.fused_weights = keep_float8(block, block_layout(model.config))
    return model


def learned(model: Llama) -> tuple[float, dict[str, Tensor]]:
    data = encoded(4, 9)
    packer = Packer(data, shared_preambles(data), mask_prompt=True, row_tokens=500)
    names, parameters = zip(*adapter_parameters(model), strict=True)
    loss = row_loss(model, packer.row(list(range(9))), executor=Executor("modules"))
    return float(loss.detach()), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_every_part_learns_what_it_learns_on_the_base_in_bf16(form: str) -> None:
    """Three bits of mantissa: an error of some percent in each product."""
    (loss, gradients), (near, others) = (learned(model_of(form, float8=float8)) for float8 in (False, True))
    assert near == pytest.approx(loss, rel=0.02)
    for name, gradient in gradients.items():
        cosine = torch.cosine_similarity(others[name].flatten(), gradient.flatten(), dim=0)
        assert cosine > 0.7, name


def test_biases_and_scales_are_not_trained_beside_it() -> None:
    model = open_adapter(random_llama(3, torch.bfloat16, **SIZES), AdapterConfig(version="v2"))
    with pytest.raises(UserError, match="the adapter trains the linear layers' biases and scales; use base"):
        prepare(model, float8=True)


@pytest.mark.parametrize("form", FORMS)
def test_the_cuda_executors_compute_it_and_files_hold_the_same_names(form: str) -> None:
    plain, model = (model_of(form, float8=float8) for float8 in (False, True))
    assert unsupported(model, Setting(torch.device("cuda"), torch.bfloat16)) is None
    assert adapter_state(model).keys() == adapter_state(plain).keys()
    assert not [name for name, _ in model.named_parameters() if name.endswith("proj.weight")]
