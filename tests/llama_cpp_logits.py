"""Logits of a GGUF file by llama.cpp itself.

llama-cpp-py-sync brings it as a wheel; it is no dependency, because a library built for other processors
would end the tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

REASON = "needs llama.cpp: pip install llama-cpp-py-sync"


def opened(path: Path, context: int = 512) -> Any:
    """The file in llama.cpp, with keys and values in fp32."""
    library = pytest.importorskip("llama_cpp_py_sync", reason=REASON)
    return library.Llama(
        str(path), n_ctx=context, n_threads=1, flash_attn_type=0, type_k="f32", type_v="f32", use_mmap=False
    )


def llama_cpp_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Logits ``[T, V]`` of every position, token by token."""
    rows = []
    model._clear_context_state()
    for place, token in enumerate(ids):
        model._eval_tokens([token], place)
        row = model._ffi.buffer(model._lib.llama_get_logits_ith(model._ctx, -1), 4 * model.n_vocab)
        rows.append(torch.from_numpy(np.frombuffer(row, np.float32).copy()))
    return torch.stack(rows)
