"""Decoding on a CUDA device: the fused step and captured steps, against formulas and the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from prefix_formula import reference_logits
from tiny_models import open_adapter, random_ids, random_llama
from torch import Tensor, nn

from lit_adapter.generation import graph_decoder
from lit_adapter.generation.decode import decode
from lit_adapter.generation.settings import Sampling
from lit_adapter.model.adapter import adapter_parameters, adapter_state
from lit_adapter.model.cache import DecodeView, KeyValueCache
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.fused_step import FusedStep, fusible
from lit_adapter.model.llama import Llama

pytestmark = pytest.mark.gpu

VOCAB = 509
LENGTHS = (5, 1, 17, 9, 9, 2, 300, 70)


def adapted(n_head: int, n_kv_head: int, head_dim: int, gate: str, K: int = 5) -> Llama:
    """A bf16 base with open gates, on the CPU."""
    sizes = {"n_embd": 128, "n_hidden": 200, "vocab_size": VOCAB}
    model = random_llama(
        1, torch.bfloat16, n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim, **sizes
    ).eval()
    open_adapter(model, AdapterConfig(layers=2, prompt_length=K, gate=gate), seed=2)
    return model.requires_grad_(False)


def widened(model: Llama) -> Llama:
    """The same numbers in fp64."""
    wide = copy.deepcopy(model).double()
    wide.inverse_frequency = model.inverse_frequency
    return wide


def distance(found: Tensor, wanted: Tensor) -> float:
    return ((found.double().cpu() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(
    ("heads", "gate", "K", "lengths"),
    [
        ((4, 2, 64), "tanh", 5, [70]),
        ((4, 4, 128), "channel", 17, [250]),
        ((8, 1, 32), "layer", 1, [0]),
        ((4, 2, 64), "identity", 10, [0, 130, 63]),
        ((8, 2, 16), "tanh", 10, list(range(20))),
        ((4, 4, 32), "tanh", 10, list(range(70))),
    ],
    ids=["one", "one-many-prompts", "one-empty", "three", "twenty", "seventy"],
)
def test_a_fused_step_is_as_near_to_fp64_as_the_model_itself(
    heads: tuple[int, int, int], gate: str, K: int, lengths: list[int]
) -> None:
    model = adapted(*heads, gate, K)
    exact, device = widened(model), copy.deepcopy(model).cuda()
    caches = [KeyValueCache(on, len(lengths), 300) for on in (device, device, exact)]
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, *caches[0].k.shape, generator=generator).bfloat16()
    for cache in caches:
        cache.k.copy_(k)
        cache.v.copy_(v)
    assert fusible(device)
    fused = FusedStep(device, caches[0])
    token = random_ids(len(lengths), vocab=VOCAB)
    for n in range(3):
        position = torch.tensor(lengths) + n
        found = fused(token.cuda(), position.cuda())
        plain = device.head(device(token[:, None].cuda(), view(device, caches[1], position.cuda()))[:, 0])
        wanted = exact.head(exact(token[:, None], view(exact, caches[2], position))[:, 0])
        assert distance(found, wanted) < 1.5 * distance(plain, wanted) + 1e-3
        token = wanted.argmax(-1)
    assert distance(caches[0].k, caches[2].k) < 0.01
    assert distance(caches[0].v, caches[2].v) < 0.01


def view(model: Llama, cache: KeyValueCache, position: Tensor) -> DecodeView:
    position = position[:, None]
    return DecodeView(cache, model.rotation(position), position, cache.length, exact=False)


def answers(model: Llama, how: Sampling, batch_size: int) -> list[list[int]]:
    prompts = [random_ids(length, seed=n, vocab=VOCAB).tolist() for n, length in enumerate(LENGTHS)]
    found: list[list[int]] = [[] for _ in prompts]
    for number, token in decode(model, prompts, how, frozenset({7, 300}), batch_size=batch_size):
        if token is not None:
            found[number].append(token)
    return found


@pytest.mark.parametrize(
    "how",
    [
        Sampling(max_new_tokens=40),
        Sampling(max_new_tokens=40, temperature=1.2, seed=3),
        Sampling(max_new_tokens=40, temperature=0.9, top_p=0.9, repetition_penalty=1.3, seed=8),
    ],
    ids=["greedy", "sampled", "penalised"],
)
def test_captured_steps_in_fp32_give_the_tokens_of_the_cpu(how: Sampling) -> None:
    model = adapted(4, 2, 32, "tanh").float()
    device = copy.deepcopy(model).cuda()
    assert not fusible(device)
    wanted = answers(model, how, 1)
    for batch_size in (1, 3, len(LENGTHS)):
        assert answers(device, how, batch_size) == wanted


@pytest.mark.parametrize("batch_size", [1, 3, len(LENGTHS)])
def test_fused_answers_follow_the_formula(batch_size: int) -> None:
    """Every token is the likeliest of the written-out model, or as likely within bf16's rounding."""
    model = adapted(4, 2, 32, "tanh")
    state = {name: tensor for name, tensor in model.state_dict().items() if ".prefix." not in name}
    found = answers(copy.deepcopy(model).cuda(), Sampling(max_new_tokens=40), batch_size)
    for number, (length, new) in enumerate(zip(LENGTHS, found, strict=True)):
        ids = torch.cat([random_ids(length, seed=number, vocab=VOCAB), torch.tensor(new, dtype=torch.long)])
        logits = reference_logits(model.config, state, adapter_state(model), "tanh", ids)[length - 1 : -1]
        taken = logits.gather(-1, ids[length:, None])[:, 0]
        assert (logits.amax(-1) - taken < 0.2 * logits.std()).all()


def test_a_seed_gives_the_same_fused_text_again() -> None:
    device = adapted(4, 4, 64, "tanh").cuda()
    how = Sampling(max_new_tokens=60, temperature=1.0, seed=5)
    assert answers(device, how, 3) == answers(device, how, 3)


def test_what_is_not_plain_takes_the_path_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.Linear):
        pass

    plain = adapted(4, 2, 64, "tanh").cuda()
    assert fusible(plain)
    half = copy.deepcopy(plain).half()
    for _, parameter in adapter_parameters(half):
        parameter.data = parameter.data.float()
    other = copy.deepcopy(plain)
    other.layers[1].mlp.up_proj.__class__ = Scaled
    biased = random_llama(0, torch.bfloat16, attention_bias=True, head_dim=16).cuda()
    odd = random_llama(0, torch.bfloat16, head_dim=24).cuda()
    monkeypatch.delattr(graph_decoder, "FusedStep")
    for model in (half, other, biased, odd):
        assert not fusible(model)
        assert list(decode(model, [[1, 2, 3]], Sampling(max_new_tokens=5), frozenset()))[-1] == (0, None)
