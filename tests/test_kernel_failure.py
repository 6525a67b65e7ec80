"""A kernel that does not compile in the middle of a run: its step is computed again by the modules."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from finetune_runs import Stopper

from lit_adapter.config import Config
from lit_adapter.model import executors
from lit_adapter.model.attention import SegmentView
from lit_adapter.model.executors import Executor, KernelError, kernels_given_up
from lit_adapter.training import module
from lit_adapter.training.finetune import finetune

ROWS = ("--optim.row_tokens", "200", "--adapter.dropout", "0.1")  # several rows a step


class _FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> torch.Tensor:
        raise KernelError("query_gradient_kernel", RuntimeError("PassManager::run failed"))


@pytest.fixture
def failing_view(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """In place of the fused executor: the modules, until their ``at``-th row fails as ``where`` says."""
    state: dict[str, Any] = {"rows": 0, "at": 0, "where": "forward"}

    class View(SegmentView):
        def __init__(self, model: Any, row: Any, rotation: Any, *, recompute: bool = False) -> None:
            super().__init__(row, rotation, recompute=recompute)
            state["rows"] += torch.is_grad_enabled()

        def run(self, block: Any, x: torch.Tensor, query_positions: Any) -> torch.Tensor:
            fails = state["rows"] == state["at"] and torch.is_grad_enabled() and block.self_attn.index == 1
            if fails and state["where"] == "forward":
                raise KernelError("forward_kernel", RuntimeError("PassManager::run failed"))
            y = super().run(block, x, query_positions)
            return _FailsBackward.apply(y) if fails else y

    fused = ModuleType("lit_adapter.model.fused")
    fused.FusedView = View  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lit_adapter.model.fused", fused)
    monkeypatch.setattr(executors, "_given_up", [])
    monkeypatch.setattr(
        module,
        "choose",
        lambda *_: Executor("modules" if kernels_given_up() else "fused", kernels_given_up()),
    )
    return state


@pytest.mark.parametrize("where", [pytest.param("forward", marks=pytest.mark.slow), "backward"])
def test_a_step_is_computed_again_by_the_modules(
    tiny: Callable[..., Config],
    failing_view: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    assert finetune(tiny(*ROWS, out="whole"), say=Stopper()) == 0
    rows = failing_view["rows"]
    failing_view |= {"rows": 0, "at": rows // 2, "where": where}
    assert finetune(tiny(*ROWS, out="failing"), say=Stopper()) == 0
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "kernel" in line]
    name = "forward_kernel" if where == "forward" else "query_gradient_kernel"
    assert warning == (
        f"warning: the kernel {name} does not compile on this device ('PassManager::run failed'); "
        "the run goes on without kernels, which is slower"
    )
    assert failing_view["rows"] == rows // 2  # no row after it was given to the kernels
    whole, failing = (Path(tiny(out=name).out) / "adapter.safetensors" for name in ("whole", "failing"))
    assert whole.read_bytes() == failing.read_bytes()


def test_a_kernel_of_head_norms_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton comes with PyTorch's builds for CUDA")
    from triton.errors import TritonError
    from triton.runtime.jit import JITFunction

    from lit_adapter.model.kernels import heads

    def fail(*_: Any, **__: Any) -> None:
        raise TritonError("PassManager::run failed")

    monkeypatch.setattr(JITFunction, "run", fail)
    x, weight = torch.zeros(3, 2 * 16), torch.ones(16)
    with pytest.raises(KernelError, match="the kernel _norm_kernel does not compile"):
        heads.norm(x, weight, 1e-5, None, x)
    with pytest.raises(KernelError, match="the kernel _norm_gradient_kernel does not compile"):
        heads.norm_backward_(x, x, weight, 1e-5)
