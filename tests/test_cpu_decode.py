"""Decode steps on joined matrices give the logits of the whole text's forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation_fixtures import decode
from tiny_models import open_adapter, random_llama
from torch import Tensor

from lit_adapter.generation.adapter import Adapter
from lit_adapter.generation.settings import Sampling
from lit_adapter.model import cache, cpu_decode, joining, pieces
from lit_adapter.model.adapter import adapter_parameters
from lit_adapter.model.attention import CausalView
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.cpu_decode import CpuDecode, DecodeWeights, _Matrix
from lit_adapter.model.executors import Setting
from lit_adapter.model.frame import framed
from lit_adapter.model.llama import Llama
from lit_adapter.model.lora_config import LoraConfig
from lit_adapter.model.pieces import Piece
from lit_adapter.model.torch_internals import packs

CASES: dict[str, tuple[dict[str, Any], AdapterConfig | None]] = {
    "gqa-top-layer": ({}, AdapterConfig(prompt_length=4, layers=1)),
    "mha-channel-gates": ({"n_kv_head": 4}, AdapterConfig(prompt_length=3, gate="channel")),
    "mqa-tied-layer-gates": ({"n_kv_head": 1, "tie_embeddings": True}, AdapterConfig(gate="layer")),
    "gqa-token-gates": ({}, AdapterConfig(prompt_length=4, gate="token", prefix_query="unrotated")),
    "norms": ({}, AdapterConfig(prompt_length=4, layers=1, norms=True)),
    "biases": ({"attention_bias": True, "mlp_bias": True}, AdapterConfig(prompt_length=4)),
    "plain-base": ({"n_hidden": 20, "head_dim": 6}, None),
}
PROMPTS = [[5, 9, 2, 40], [7, 7], [3, 8, 1, 1, 30, 4, 12]]


def model_of(name: str, dtype: torch.dtype) -> Llama:
    sizes, adapter = CASES[name]
    model = random_llama(3, torch.float64, **sizes)
    model = model if adapter is None else open_adapter(model, adapter, seed=2)
    model = model.to(dtype).requires_grad_(False)
    for _, parameter in adapter_parameters(model):  # a run never has them in fewer bits
        parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
    return model


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
    texts = [list(prompt) for prompt in PROMPTS[:n_texts]]
    with torch.inference_mode():
        prefixes = Adapter.of(model).prefixes
        executor = CpuDecode(model, n_texts, 16)
        hidden = executor.read([Piece(list(text), slot, prefixes) for slot, text in enumerate(texts)])
        found = model.logits(hidden)
        for _ in range(5):
            for text, logits in zip(texts, found, strict=True):
                exact = wanted(model, text)
                assert (logits - exact).norm() < tolerance * exact.norm()
                text.append(int(exact.argmax()))
            found = executor.step([text[-1] for text in texts], [len(text) - 1 for text in texts])


@pytest.mark.parametrize("name", CASES)
def test_a_common_start_is_read_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second prompt is the start with one more token; the slots are not in order."""
    model, start, slots = model_of(name, torch.float64), [11, 4, 4, 50, 8, 21], [2, 0, 1]
    texts = [[*start, 5, 9, 2, 40], [*start, 7], [*start, 3, 8, 1, 1, 30, 4]]
    n_read = []
    forward = Llama.forward
    monkeypatch.setattr(Llama, "forward", lambda *given: n_read.append(given[1].shape) or forward(*given))
    monkeypatch.setattr(pieces, "LEAST_SAVED", 12)
    with torch.inference_mode():
        executor = CpuDecode(model, 3, 16)
        prefixes, given = Adapter.of(model).prefixes, [list(text) for text in texts]
        read = [Piece(text, slot, prefixes) for text, slot in zip(given, slots, strict=True)]
        found = model.logits(executor.read(read))
        assert n_read == [(1, 6), (1, 4 + 1 + 6)]
        for _ in range(3):
            for text, logits in zip(texts, found, strict=True):
                exact = wanted(model, text)
                assert (logits - exact).norm() < 1e-10 * exact.norm()
                text.append(int(exact.argmax()))
            by_slot = [texts[slots.index(slot)] for slot in range(3)]
            found = executor.step([text[-1] for text in by_slot], [len(text) - 1 for text in by_slot])[slots]


@pytest.mark.parametrize("name", ["gqa-top-layer", "norms"])
def test_it_is_what_answers_and_the_texts_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, settings = model_of(name, dtype), Sampling.of(max_new_tokens=6)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_decode, "unsupported", lambda model, setting: "not now")
            plain = list(decode(model, PROMPTS, settings, frozenset(), batch_size=2))
        assert model.decode_weights is None
        monkeypatch.setattr(cache, "DecodeView", None)
        assert list(decode(model, PROMPTS, settings, frozenset(), batch_size=2)) == plain
        assert model.decode_weights is not None
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("sizes", "adapter", "reason"),
    [
        ({}, AdapterConfig(version="v2"), "an AdaptedLinear"),
        ({}, None, "being trained"),
    ],
)
def test_other_models_keep_their_own_forward_pass(
    sizes: dict[str, Any], adapter: AdapterConfig | None, reason: str
) -> None:
    model = open_adapter(random_llama(3, torch.float32, **sizes), adapter or AdapterConfig())
    model.requires_grad_(adapter is None)
    assert reason in str(cpu_decode.unsupported(model, Setting.of(model)))
    assert list(decode(model, PROMPTS, Sampling.of(max_new_tokens=6), frozenset()))
    assert model.decode_weights is None


@pytest.mark.parametrize("n_threads", [1, 4, 7, 48])
def test_the_matrices_are_the_models_own(n_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is asked for in the middle of an answer: the model may be trained afterwards."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    model = random_llama(3, torch.float32, vocab_size=60, head_dim=4, n_hidden=20)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert cpu_decode.unsupported(model, Setting.of(model)) is None
    with torch.inference_mode():
        weights = DecodeWeights(model)
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
    assert "more memory than is free" in str(cpu_decode.unsupported(model, Setting.of(model)))
    monkeypatch.setattr(cpu_decode, "free_bytes", lambda _: size)
    assert cpu_decode.unsupported(model, Setting.of(model)) is None


def steps_of(model: Llama, n_texts: int) -> Tensor:
    """The logits of one step after prompts."""
    executor, prefixes = CpuDecode(model, n_texts, 16), Adapter.of(model).prefixes
    executor.read([Piece(list(PROMPTS[slot]), slot, prefixes) for slot in range(n_texts)])
    return executor.step([3] * n_texts, [len(prompt) for prompt in PROMPTS[:n_texts]])


def is_packed(model: Llama) -> bool:
    return model.decode_weights.head.packed is not None


@pytest.mark.parametrize(("dtype", "fewest"), [(torch.float32, 3), (torch.bfloat16, 1)])
def test_matrices_are_packed_for_steps_of_several_rows(dtype: torch.dtype, fewest: int) -> None:
    if not packs(dtype):
        pytest.skip(f"oneDNN packs no weights in {dtype} on this processor")
    for n_texts in (1, 2, 3):
        model = model_of("biases", dtype)
        with torch.inference_mode():
            steps_of(model, n_texts)
        assert is_packed(model) == (n_texts >= fewest)


def test_matrices_are_not_packed_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what is free may go; the tied output layer is not counted twice."""
    model = model_of("mqa-tied-layer-gates", torch.float32)
    size = sum(4 * weight.numel() for name, weight in model.named_parameters() if weight.ndim == 2)
    size -= sum(4 * prompt.numel() for name, prompt in model.named_parameters() if name.endswith("prompt"))
    for free, packed in ((2 * size - 1, False), (2 * size, packs(torch.float32))):
        model.decode_weights = None
        monkeypatch.setattr(joining, "free_bytes", lambda _, free=free: free)
        with torch.inference_mode():
            found = steps_of(model, 3)
            exact = torch.stack([wanted(model, [*prompt, 3]) for prompt in PROMPTS])
        assert is_packed(model) == packed
        assert (found - exact).norm() < 2e-5 * exact.norm()


def test_models_on_one_base_share_its_packed_matrices() -> None:
    """Though each has updates of its own."""
    if not packs(torch.float32):
        pytest.skip("oneDNN packs no weights on this processor")
    base = random_llama(3, torch.float32)
    lora = AdapterConfig(prompt_length=0, lora=LoraConfig(rank=2, on=("attention",)))
    models = [open_adapter(framed(base), lora, seed=seed).requires_grad_(False) for seed in (1, 2)]
    with torch.inference_mode():
        found = [steps_of(model, 3) for model in models]
    first, second = (model.decode_weights for model in models)
    assert first.head.packed is second.head.packed
    assert all(a.qkv.packed is b.qkv.packed for a, b in zip(first.layers, second.layers, strict=True))
    assert not torch.allclose(*found)
