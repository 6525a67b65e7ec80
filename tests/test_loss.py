from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_adapter.model import loss
from lit_adapter.model.loss import target_loss

V, C = 23, 8


def case(n_targets: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n_targets)
    hidden = torch.randn(n_targets, C, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, C, generator=generator, dtype=torch.float64).to(dtype)
    return hidden.requires_grad_(), weight, torch.randint(0, V, (n_targets,), generator=generator)


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 100], ids=lambda rows: f"chunk-{rows}")
@pytest.mark.parametrize("n_targets", [1, 6, 13])
def test_value_and_gradient_equal_cross_entropy(
    n_targets: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", rows * V + V // 2)
    monkeypatch.setattr(loss, "FEWEST_ROWS", 4)
    hidden, weight, target = case(n_targets)
    found = target_loss(hidden, weight, target)
    wanted = F.cross_entropy(hidden @ weight.T, target, reduction="sum")
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    a, b = (torch.autograd.grad(value * 0.37, hidden)[0] for value in (found, wanted))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_chunk_smaller_than_the_vocabulary_takes_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 3)
    hidden, weight, target = case(4)
    wanted = F.cross_entropy(hidden @ weight.T, target, reduction="sum")
    torch.testing.assert_close(target_loss(hidden, weight, target), wanted)


def test_no_target_gives_zero_and_an_empty_gradient() -> None:
    hidden, weight, target = case(0)
    found = target_loss(hidden, weight, target)
    assert found.item() == 0.0
    (gradient,) = torch.autograd.grad(found, hidden)
    assert gradient.shape == (0, C)


def test_without_gradient_the_value_is_the_same() -> None:
    hidden, weight, target = case(9)
    with torch.no_grad():
        wanted = F.cross_entropy(hidden @ weight.T, target, reduction="sum")
        torch.testing.assert_close(target_loss(hidden.detach(), weight, target), wanted)


def test_huge_logits_stay_finite() -> None:
    hidden, weight, target = case(5)
    hidden = (hidden.detach() * 1e4).requires_grad_()
    found = target_loss(hidden, weight, target)
    torch.testing.assert_close(found, F.cross_entropy(hidden @ weight.T, target, reduction="sum"))
    assert torch.autograd.grad(found, hidden)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_inputs_are_summed_in_fp32(dtype: torch.dtype) -> None:
    """Only the product with the head is narrow; a bf16 sum over 500 targets would be off by whole nats."""
    hidden, weight, target = case(500, dtype)
    found = target_loss(hidden, weight, target)
    assert found.dtype == torch.float32
    (gradient,) = torch.autograd.grad(found, hidden)
    assert gradient.dtype == dtype
    wide = hidden.detach().double().requires_grad_()
    wanted = F.cross_entropy(wide @ weight.double().T, target, reduction="sum")
    (exact,) = torch.autograd.grad(wanted, wide)
    rounding = torch.finfo(dtype).eps
    assert abs(found.item() - wanted.item()) / wanted.item() < rounding
    assert (gradient.double() - exact).norm() / exact.norm() < 2 * rounding


def test_the_frozen_head_gets_no_gradient() -> None:
    hidden, weight, target = case(3)
    weight.requires_grad_()
    target_loss(hidden, weight, target).backward()
    assert weight.grad is None
