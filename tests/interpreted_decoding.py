"""Compares CUDA decoding with the modules in Triton's interpreter, which needs no GPU.

    TRITON_INTERPRET=1 python tests/interpreted_decoding.py

Slots have different adapters, some of them with norms, and change them; others have a model of their own, V2
or on a base with yarn. Kernels read the prompts of all slots in one row, or as queries of one step, whole and
in pieces. Each line has the number of slots and the largest relative error of a slot's hidden states or
logits, in fp32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from interpreted import YARN, without_a_device
from paper import paper
from tiny_models import open_adapter, random_ids, random_llama

from lit_adapter.generation.adapter import Adapter, attached
from lit_adapter.model import fused_decode
from lit_adapter.model.adapter import adapter_state
from lit_adapter.model.cache import ModuleDecode
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.fused_decode import FusedDecode
from lit_adapter.model.kernels import decode_attention
from lit_adapter.model.llama import Llama
from lit_adapter.model.lora_config import LoraConfig
from lit_adapter.model.pieces import Piece
from lit_adapter.model.slot_prefixes import Prefixes

FORMS = [
    AdapterConfig(layers=2, prompt_length=3, gate="token", prefix_query="unrotated", norms=True),
    None,
    AdapterConfig(prompt_length=5, norms=True),
    AdapterConfig(prompt_length=0, norms=True),
    paper(layers=1, prompt_length=4, gate="channel"),
]
VOCAB = 67
SIZES = {"n_embd": 64, "n_hidden": 48, "n_head": 4, "n_kv_head": 2, "n_layer": 2, "vocab_size": VOCAB}
ALONE: list[tuple[AdapterConfig, dict[str, Any]]] = [
    (AdapterConfig(version="v2", prompt_length=3, layers=1, head=True), {}),
    (AdapterConfig(version="v2", prompt_length=3), {"head_norms": True}),
    (AdapterConfig(prompt_length=3, prefix_query="unrotated", lora=LoraConfig(rank=2)), {"rope": YARN}),
    (AdapterConfig(prompt_length=3, prefix_query="unrotated"), {"rope": YARN}),
]


def prefixes_on(base: Llama) -> list[Prefixes]:
    """What the slots of each form are given; all of them are computed by the base."""
    found = []
    for seed, form in enumerate(FORMS):
        model = base
        if form is not None:
            state = adapter_state(open_adapter(copy.deepcopy(base), form, seed=seed))
            model = attached(base, form, state, "it")
        adapter = Adapter.of(model, base)
        assert adapter.model is base
        found.append(adapter.prefixes)
    return found


def ways_to_read(fused: FusedDecode) -> Iterator[None]:
    """Packed into rows, as queries of a step in tiles, and each query alone."""
    tile, fused_decode.ROW_KEYS = fused.tile_size, 0
    for fused_decode.SHORT_READ, fused.tile_size in ((0, tile), (256, tile), (256, 1)):
        yield
    fused.tile_size = tile
    assert {size for _, size in fused.short_reads} == {1, tile}


def compare(n_slots: int, head_dim: int, **more: Any) -> None:
    """Compare slots of a base with heads of a size."""
    base = random_llama(1, torch.float32, head_dim=head_dim, **SIZES, **more).eval().requires_grad_(False)
    forms = prefixes_on(base)
    with torch.inference_mode():
        fused = FusedDecode(base, n_slots, 24)
        fused.capture_reads()
        assert set(fused.short_reads) == {(n, size) for n in (16, 32) for size in (1, 8)}
        assert all(read.graph for read in fused.short_reads.values())
        take_steps([ModuleDecode(base, n_slots, 24), fused], forms, n_slots)


def compare_alone(form: AdapterConfig, sizes: dict[str, Any]) -> None:
    """Compare three slots of a model with one adapter."""
    base = random_llama(1, torch.float32, head_dim=16, **SIZES, **sizes)
    model = open_adapter(base, form, seed=3).eval().requires_grad_(False)
    with torch.inference_mode():
        executors = [ModuleDecode(model, 3, 24), FusedDecode(model, 3, 24)]
        take_steps(executors, [Adapter.of(model).prefixes], 3)


def compare_beside_damaged(damage: float) -> None:
    """Compare slots that are read in one row with that of an adapter whose values are not finite."""
    base = random_llama(1, torch.float32, head_dim=16, **SIZES).eval().requires_grad_(False)
    own, texts = prefixes_on(base)[:3], [random_ids(n, seed=n, vocab=VOCAB).tolist() for n in (5, 9, 7)]
    with torch.inference_mode():
        own[1] = replace(own[0], stacked=replace(own[0].stacked, v=own[0].stacked.v * damage))
        pieces = [Piece(*each) for each in zip(texts, range(3), own, strict=True)]
        modules, fused = ModuleDecode(base, 3, 24), FusedDecode(base, 3, 24)
        wanted = torch.cat([modules.read([piece]) for piece in pieces])
        for _ in ways_to_read(fused):
            found = fused.read(pieces)
            assert found[1].isnan().all()
            report(wanted[::2], found[::2])
            fused.read([replace(piece, prompt=piece.prompt[:3]) for piece in pieces])
            report(wanted[::2], fused.read([replace(piece, done=3) for piece in pieces])[::2])


def compare_attention(heads: tuple[int, int], size: int, window: int | None, length: int) -> None:
    """Compare tiles of queries, each of a slot of its own, with the formula in fp64."""
    H, G, D, S, n_tiles = *heads, 16, length + 2, 3
    draw = torch.Generator().manual_seed(length)
    q, k, v = (
        torch.randn(*shape, generator=draw)
        for shape in ((n_tiles * size, H * D), (n_tiles, G, S, D), (n_tiles, G, S, D))
    )
    slot = torch.tensor([2, 0, 1]).repeat_interleave(size)
    last = torch.tensor([length, 40, size])[slot]  # of its tile's queries
    position = last - size + 1 + torch.arange(size).repeat(n_tiles)
    position[-1] = S - 1  # of no text
    parts = decode_attention.Parts(n_tiles, size, heads, D, S, q.device)
    found, angles, source = torch.full_like(q, math.nan), torch.zeros(S, D // 2), torch.arange(n_tiles)
    decode_attention.attend(q, (k, v), (angles, angles), position, None, source, parts, found, window, slot)
    at = torch.arange(S)
    seen = (at <= position[:, None]) & (at > position[:, None] - (window or S)) & (position[:, None] < S - 1)
    keys, values = (x.double().repeat_interleave(H // G, 1)[slot] for x in (k, v))  # [N, H, S, D]
    score = torch.einsum("nhd,nhsd->nhs", q.double().unflatten(1, (H, D)), keys) * D**-0.5
    weight = score.masked_fill(~seen[:, None], -math.inf).softmax(-1).nan_to_num(0)
    wanted = torch.einsum("nhs,nhsd->nhd", weight, values).flatten(1)
    assert found[-1].eq(0).all()
    report(wanted[:-1], found[:-1])


def take_steps(executors: list[ModuleDecode], forms: list[Prefixes], n_slots: int) -> None:
    """Read prompts and take steps, and again after the slots have changed their adapters."""
    asked = [random_ids(2 + 3 * slot % 11, seed=slot, vocab=VOCAB).tolist() for slot in range(n_slots)]
    for shift in (0, 1):
        own = [forms[(slot + shift) % len(forms)] for slot in range(n_slots)]
        pieces = [Piece(*each) for each in zip(asked, range(n_slots), own, strict=True)]
        modules, fused = executors
        wanted = torch.cat([modules.read([piece]) for piece in pieces])
        n_read = [min(slot, len(prompt) - 1) for slot, prompt in enumerate(asked)]
        pairs = list(zip(pieces, n_read, strict=True))
        for _ in ways_to_read(fused):
            report(wanted, fused.read(pieces))
            fused.read([replace(piece, prompt=piece.prompt[: n + 1]) for piece, n in pairs])
            report(wanted, fused.read([replace(piece, done=n) for piece, n in pairs]))
        token = random_ids(n_slots, vocab=VOCAB)
        for n in range(2):
            position = torch.tensor([len(prompt) for prompt in asked]) + n
            wanted, found = (x.captured_step(token, position, 24) for x in executors)
            report(wanted, found)
            token = wanted.argmax(-1)
        n = max(1, n_slots - 1)  # the first slots, the last of which has no request
        position[n - 1] = 23
        wanted, found = (x.captured_step(token[:n], position[:n], 24) for x in executors)
        assert found.isfinite().all()
        if n > 1:
            report(wanted[:-1], found[:-1])


def report(wanted: torch.Tensor, found: torch.Tensor) -> None:
    errors = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    print(len(found), errors.max().item())


if __name__ == "__main__":
    without_a_device()
    torch.cuda.get_device_capability = lambda *_: (8, 0)  # launches do not overlap there
    torch.Tensor.pin_memory = lambda self: self
    fused_decode.capture = lambda body: body
    for n_slots, head_dim in ((5, 32), (1, 32), (5, 16)):
        compare(n_slots, head_dim)
    compare(5, 16, head_norms=True, rope=YARN)
    for form, sizes in ALONE:
        compare_alone(form, sizes)
    for heads, size in (((2, 2), 16), ((3, 1), 4), ((4, 2), 8), ((2, 2), 1)):
        for window in (None, 1, 37, 70):
            for length in (130, 45):
                compare_attention(heads, size, window, length)
    compare_beside_damaged(math.nan)
    compare_beside_damaged(math.inf)
