"""Decode steps on laid-out matrices: the logits of the whole text's forward pass."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from tiny_models import open_adapter, random_llama
from torch import Tensor

from lit_adapter.generation.decode import decode
from lit_adapter.generation.decoder import Decoder, Slot
from lit_adapter.generation.settings import Sampling
from lit_adapter.model import cpu_decode
from lit_adapter.model.adapter import plain_base
from lit_adapter.model.attention import CausalView
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.cpu_decode import CpuDecode, DecodeWeights, _Matrix
from lit_adapter.model.llama import Llama

CASES: dict[str, tuple[dict[str, Any], AdapterConfig | None]] = {
    "gqa-top-layer": ({}, AdapterConfig(prompt_length=4, layers=1)),
    "mha-channel-gates": ({"n_kv_head": 4}, AdapterConfig(prompt_length=3, gate="channel")),
    "mqa-tied-layer-gates": ({"n_kv_head": 1, "tie_embeddings": True}, AdapterConfig(gate="layer")),
    "plain-base": ({"n_hidden": 20, "head_dim": 6}, None),
}
PROMPTS = [[5, 9, 2, 40], [7, 7], [3, 8, 1, 1, 30, 4, 12]]


def model_of(name: str, dtype: torch.dtype) -> Llama:
    sizes, adapter = CASES[name]
    model = random_llama(3, torch.float64, **sizes)
    model = model if adapter is None else open_adapter(model, adapter, seed=2)
    return model.to(dtype).requires_grad_(False)


def wanted(model: Llama, text: list[int]) -> Tensor:
    """The logits after ``text``, from one forward pass over all of it."""
    ids = torch.tensor([text])
    return model.logits(model(ids, CausalView(model.rotation(torch.arange(len(text))[None]))))[0, -1]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("n_texts", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_steps_give_the_whole_texts_logits(
    name: str,
    n_texts: int,
    n_threads: int,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With 61 possible tokens, a prime number, the head is cut unevenly."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    model = model_of(name, dtype)
    model.decode_weights = DecodeWeights(model)
    texts = [list(prompt) for prompt in PROMPTS[:n_texts]]
    decoder = Decoder(model, n_texts, 16, Sampling.of(max_new_tokens=5))
    slots: list[Slot | None] = list(decoder.prefill(texts, range(n_texts), range(n_texts)))
    assert model.decode_weights.ready
    for _ in range(4):
        token, position = [slot.token for slot in slots], [slot.length for slot in slots]
        found = CpuDecode(model, decoder.cache).step(token, position)
        for text, slot, logits in zip(texts, slots, found, strict=True):
            text.append(slot.token)
            exact = wanted(model, text)
            assert (logits - exact).norm() < tolerance * exact.norm()
        decoder.step(slots)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_what_answers_and_the_texts_are_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, settings = model_of("gqa-top-layer", dtype), Sampling.of(max_new_tokens=6)
    plain = list(decode(model, PROMPTS, settings, frozenset(), batch_size=2))
    model.decode_weights = DecodeWeights(model)
    monkeypatch.setattr("lit_adapter.generation.decoder.DecodeView", None)
    assert list(decode(model, PROMPTS, settings, frozenset(), batch_size=2)) == plain


@pytest.mark.parametrize(
    ("sizes", "adapter"),
    [({"attention_bias": True}, AdapterConfig()), ({}, AdapterConfig(version="v2"))],
)
def test_other_models_keep_their_own_forward_pass(sizes: dict[str, Any], adapter: AdapterConfig) -> None:
    model = open_adapter(random_llama(3, torch.float32, **sizes), adapter).requires_grad_(False)
    settings = Sampling.of(max_new_tokens=6)
    plain = list(decode(model, PROMPTS, settings, frozenset()))
    model.decode_weights = DecodeWeights(model)
    assert not model.decode_weights.ready
    assert list(decode(model, PROMPTS, settings, frozenset())) == plain


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_an_adapter_that_is_put_aside_first_is_the_same_afterwards(version: Literal["v1", "v2"]) -> None:
    """V2 scales the projections of its prompts too, but not while the plain base answers."""
    model = open_adapter(random_llama(3, torch.float32), AdapterConfig(version=version)).requires_grad_(False)
    settings = Sampling.of(max_new_tokens=6)
    wanted = list(decode(model, PROMPTS, settings, frozenset()))
    model.decode_weights = DecodeWeights(model)
    with plain_base(model):
        assert list(decode(model, PROMPTS, settings, frozenset())) != wanted
    assert list(decode(model, PROMPTS, settings, frozenset())) == wanted


@pytest.mark.parametrize("n_threads", [1, 4, 7, 48])
def test_the_matrices_are_the_models_own(n_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is asked for in the middle of an answer: the model may be trained afterwards."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    model = random_llama(3, torch.float32, vocab_size=60, head_dim=4, n_hidden=20)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    weights = DecodeWeights(model)
    with torch.inference_mode():
        assert weights.ready
    layers = [*weights.layers, weights]
    matrices = [part for layer in layers for part in vars(layer).values() if isinstance(part, _Matrix)]
    assert len(matrices) == 4 * len(model.layers) + 1
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert {matrix.parts.untyped_storage().data_ptr() for matrix in matrices} <= own
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert not parameter.is_inference()


def test_matrices_stay_where_they_are_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("plain-base", torch.float32)
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    monkeypatch.setattr(cpu_decode, "free_bytes", lambda _: size - 1)
    assert not DecodeWeights(model).ready
    monkeypatch.setattr(cpu_decode, "free_bytes", lambda _: size)
    assert DecodeWeights(model).ready
