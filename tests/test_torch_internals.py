"""One test for each private part of torch that `torch_internals` touches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_models import random_llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lit_adapter.model.survey import obstacle
from lit_adapter.model.torch_internals import (
    flash_attention_on_cpu,
    hooks,
    is_fsdp_part,
    pack,
    packed_linear,
    packs,
)

MOVED = f"torch {torch.__version__} has moved a private part: see torch_internals"


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_pre_hook",
        "register_forward_hook",
        "register_full_backward_pre_hook",
        "register_full_backward_hook",
    ],
)
def test_hooks(register: str) -> None:
    def hook(*args: object) -> None:
        """Does nothing."""

    module = nn.Linear(2, 2)
    assert hooks(module) == []
    getattr(module, register)(hook)
    assert hooks(module) == [hook], f"{MOVED}.hooks"
    assert not is_fsdp_part(hook)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_is_fsdp_part() -> None:
    """One process is enough for FSDP2 to give a module its class and hooks."""
    module = nn.Linear(4, 4)
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    assert type(module) is not nn.Linear
    assert is_fsdp_part(type(module)), f"{MOVED}.is_fsdp_part"
    assert not is_fsdp_part(nn.Linear)
    assert hooks(module)
    assert all(is_fsdp_part(hook) for hook in hooks(module)), f"{MOVED}.is_fsdp_part"


@pytest.mark.parametrize("with_mask", [False, True])
def test_flash_attention_on_cpu(with_mask: bool) -> None:
    """It is the formula, and it keeps no score for the backward pass on the meta device either."""
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    mask = torch.randn(1, 1, 5, 5) if with_mask else None
    score = q @ k.mT * 0.3 + (0 if mask is None else mask)
    found = flash_attention_on_cpu(q, k, v, mask, 0.3)
    torch.testing.assert_close(found, score.softmax(-1) @ v, msg=f"{MOVED}.flash_attention_on_cpu")
    kept = []
    meta = [x.to("meta").requires_grad_() for x in (q, k, v)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        flash_attention_on_cpu(*meta, None if mask is None else mask.to("meta"), 0.3)
    scores = [shape for shape in kept if shape[-2:] == (5, 5) and shape[:2] == (1, 2)]
    assert not scores, f"{MOVED}.flash_attention_on_cpu"


@pytest.mark.usefixtures("alone")
def test_a_base_that_is_sharded_is_known_to_the_survey() -> None:
    """FSDP2's classes and hooks are no obstacle; another hook on a sharded block is."""
    model = random_llama(0, torch.float32)
    for block in model.layers:
        fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
    assert obstacle(model) is None
    model.layers[1].register_forward_hook(lambda module, args, output: output)
    assert obstacle(model) == "layers.1 has a hook or another forward method"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("n_rows", [1, 3, 17, 200])
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_linear(dtype: torch.dtype, tolerance: float, n_rows: int, has_bias: bool) -> None:
    if not packs(dtype):
        pytest.skip(f"oneDNN packs no weights in {dtype} on this processor")
    drawn = torch.Generator().manual_seed(n_rows)
    x, weight, bias = (
        torch.randn(size, generator=drawn).to(dtype) for size in ((n_rows, 70), (91, 70), (91,))
    )
    y = packed_linear(x, pack(weight), bias if has_bias else None)
    exact = x.double() @ weight.double().T + (bias.double() if has_bias else 0.0)
    assert (y - exact).norm() < tolerance * exact.norm(), f"{MOVED}.packed_linear"
    assert y.dtype == dtype
