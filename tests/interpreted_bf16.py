"""Computes small rows of `test_fused`'s cases in bf16 in Triton's interpreter, which needs no GPU.

    TRITON_INTERPRET=1 python tests/interpreted_bf16.py 14 15

The interpreter keeps bf16 as whole numbers and multiplies those; here it rounds as a GPU does, and sums
products in fp32. Each line has the number of a case, what computed it, and the relative errors of its loss
and of all gradients together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from interpreted import without_a_device
from test_fused import CASES, error, exactly_and_by_modules, loss_and_gradients, row_of
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from lit_adapter.model import tiles
from lit_adapter.model.block_weights import join_groups
from lit_adapter.model.fused import FusedView

BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def is_narrow(x: Any) -> bool:
    return bool(x.dtype.scalar == tl.bfloat16)


def widened(x: Any) -> Any:
    """A handle's numbers in fp32, if they are in bf16."""
    if not is_narrow(x):
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def narrowed(data: Any) -> Any:
    """Numbers in fp32, rounded to the nearest in bf16."""
    rounded = torch.from_numpy(np.array(data, np.float32)).bfloat16().view(torch.uint16)
    return TensorHandle(rounded.numpy(), tl.bfloat16)


def with_bf16() -> None:
    """Teach the interpreter what a GPU does with bf16."""
    dot, operation = InterpreterBuilder.create_dot, InterpreterBuilder.binary_op

    def converted(convert: Callable[..., Any]) -> Callable[..., Any]:
        def cast(builder: Any, x: Any, target: Any, *how: Any) -> Any:
            if tl.bfloat16 not in (x.dtype.scalar, target.scalar):
                return convert(builder, x, target, *how)
            return widened(x) if is_narrow(x) else narrowed(x.data)

        return cast

    def product(builder: Any, a: Any, b: Any, *more: Any) -> Any:
        return dot(builder, widened(a), widened(b), *more)

    def binary(builder: Any, a: Any, b: Any, of: Any) -> Any:
        if not is_narrow(a) or of in BITWISE:
            return operation(builder, a, b, of)
        found = of(widened(a).data, widened(b).data)
        return TensorHandle(found, tl.int1) if found.dtype == np.bool_ else narrowed(found)

    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(InterpreterBuilder, name, converted(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.create_dot, InterpreterBuilder.binary_op = product, binary


def compare(number: int) -> None:
    """Print the errors of a case: the modules', and the fused blocks' in both ways to keep what they need."""
    case, row = CASES[number], row_of(CASES[number], number, n_records=4)
    exact, modules, model = exactly_and_by_modules(case, row, number, "cpu")
    join_groups(model)
    report(f"{number} modules", modules, exact)
    for name, recompute in (("fused", False), ("fused, recomputed", True)):
        view = FusedView(model, row, model.rotation(row.position[None]), recompute=recompute)
        report(f"{number} {name}", loss_and_gradients(model, row, view), exact)


def report(name: str, found: Any, exact: Any) -> None:
    print(name, float(abs(found[0] - exact[0]) / exact[0]), error(found[1], exact[1]), flush=True)


if __name__ == "__main__":
    without_a_device()
    with_bf16()
    tiles.VISITS = 2
    for given in sys.argv[1:]:
        compare(int(given))
