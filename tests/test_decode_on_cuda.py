"""Decoding on a CUDA device: the fused step and captured steps, against formulas and the CPU."""

from __future__ import annotations

import copy
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_fixtures import decode
from paper import paper
from prefix_formula import reference_logits
from tiny_models import open_adapter, random_ids, random_llama
from torch import Tensor, nn

from lit_adapter.data.shared_starts import Scored
from lit_adapter.generation import graph_lane
from lit_adapter.generation.adapted import AdaptedLlama, Loaded
from lit_adapter.generation.adapter import Adapter, attached
from lit_adapter.generation.choosing import likelihoods
from lit_adapter.generation.engine import Engine
from lit_adapter.generation.graph_lane import GraphLane
from lit_adapter.generation.prompt_likelihood import prompt_likelihoods
from lit_adapter.generation.request import Request
from lit_adapter.generation.sampling import choose
from lit_adapter.generation.settings import Sampling
from lit_adapter.model import cache
from lit_adapter.model.adapter import adapter_state
from lit_adapter.model.attention import CausalView
from lit_adapter.model.block_weights import prepare
from lit_adapter.model.cache import ModuleDecode
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.executors import choose as choose_executor
from lit_adapter.model.llama import Llama
from lit_adapter.model.lora_config import LoraConfig
from lit_adapter.model.pieces import Piece
from lit_adapter.model.rope_config import RopeConfig
from lit_adapter.model.slot_prefixes import Prefixes

pytestmark = pytest.mark.gpu

VOCAB = 509
LENGTHS = (5, 1, 17, 9, 9, 2, 300, 70)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"head_norms": True},
    "mistral": {"window": 40, "windowed_layers": (0, 1, 2)},
    "yarn": {"rope": RopeConfig(kind="yarn", factor=4.0, original_context_length=64, attention_factor=1.3)},
    "smollm3": {"unrotated_layers": (1,), "window": 3, "windowed_layers": (1,)},
}


def adapted(
    n_head: int, n_kv_head: int, head_dim: int, gate: str | None, K: int = 5, family: str = "llama"
) -> Llama:
    """A bf16 base on the CPU with open gates, unrotated queries and trained norms as ``gate`` says."""
    sizes: dict[str, Any] = {"n_embd": 128, "n_hidden": 208, "vocab_size": VOCAB}
    sizes |= {"n_head": n_head, "n_kv_head": n_kv_head, "head_dim": head_dim} | FAMILIES[family]
    model = random_llama(1, torch.bfloat16, **sizes).eval()
    if gate is not None:
        form, *more = gate.split()
        query: Any = "unrotated" if "unrotated" in more else "rotated"
        version: Any = "v2" if "v2" in more else "v1"
        config = AdapterConfig(
            layers=2, prompt_length=K, gate=form, prefix_query=query, norms="norms" in more, version=version
        )
        open_adapter(model, config, seed=2)
    return model.requires_grad_(False)


def widened(model: Llama) -> Llama:
    """The same numbers in fp64."""
    wide = copy.deepcopy(model).double()
    wide.inverse_frequency = model.inverse_frequency
    return wide


def distance(found: Tensor, wanted: Tensor) -> float:
    return ((found.double().cpu() - wanted).norm() / wanted.norm()).item()


class Plain:
    """What `FusedDecode` does, by the model's own forward pass, a text at a time."""

    def __init__(self, model: Llama, n_slots: int) -> None:
        self.executor = ModuleDecode(model, n_slots, 320)
        self.cache, self.device = self.executor.cache, self.executor.device

    def read(self, prompts: list[list[int]], slots: list[int], prefixes: Sequence[Prefixes]) -> Tensor:
        given = zip(prompts, slots, prefixes, strict=True)
        return torch.cat([self.executor.read([Piece(*each)]) for each in given])

    def step(self, token: Tensor, position: Tensor) -> Tensor:
        return self.executor.captured_step(token.to(self.device), position.to(self.device), 320)


def prefixes_of(model: Llama) -> Prefixes:
    with torch.inference_mode():
        return Adapter.of(model).prefixes


def bound(base: Llama, model: Llama) -> Adapter:
    """The adapter of ``model``, answered by ``base``."""
    adapter = Adapter.of(model, base)
    assert adapter.model is base
    return adapter


@pytest.mark.parametrize(
    ("heads", "gate", "K", "lengths", "few"),
    [
        ((4, 2, 64), "tanh", 5, [70], True),
        ((4, 4, 128), "channel", 17, [250], True),
        ((8, 1, 32), "layer norms", 1, [1], True),
        ((4, 2, 64), "token", 10, [1, 130, 63], True),
        ((8, 2, 16), "tanh unrotated", 10, [40], True),
        ((8, 2, 16), "tanh", 10, list(range(1, 21)), False),
        ((4, 4, 128), "tanh norms", 10, list(range(1, 33)), True),
        ((4, 4, 32), "token unrotated norms", 10, list(range(1, 71)), False),
        ((4, 2, 64), "tanh v2", 5, [1, 130, 63], False),
    ],
    ids=[
        "one",
        "one-many-prompts",
        "one-short",
        "three",
        "one-small",
        "small",
        "thirty-two",
        "seventy",
        "v2",
    ],
)
def test_fused_decoding_is_as_near_to_fp64_as_the_model_itself(
    heads: tuple[int, int, int],
    gate: str,
    K: int,
    lengths: list[int],
    few: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache, "LONGEST_ROW", 100)  # so that some prompts are read in several rows
    compare_with_fp64(adapted(*heads, gate, K), lengths, few)


@pytest.mark.parametrize("lengths", [[70], [1, 130, 63], list(range(1, 41))], ids=["one", "three", "forty"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_decoded_as_near_to_fp64(
    family: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "LONGEST_ROW", 100)
    model = adapted(4, 2, 64, "token unrotated", family=family)
    compare_with_fp64(model, lengths, family != "qwen3" and len(lengths) < 33)


def ways_to_read(executor: Any, pieces: list[Piece]) -> Iterator[Callable[[], Tensor]]:
    """As queries of a step if the tokens are few, each alone or in tiles; by graphs; and packed into rows."""
    few, tile = fused_decode().SHORT_READ, executor.tile_size
    for most, size in ((few, 1), (few, 1), (few, tile), (few, tile), (0, tile)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused_decode(), "SHORT_READ", most)
            patch.setattr(fused_decode(), "ROW_KEYS", 0)
            patch.setattr(executor, "tile_size", size)
            yield lambda: executor.read(pieces)


def fused_decode() -> Any:
    return importlib.import_module("lit_adapter.model.fused_decode")  # needs Triton


def compare_with_fp64(model: Llama, lengths: list[int], few: bool) -> None:
    from lit_adapter.model.fused_decode import FusedDecode

    slots = list(range(len(lengths)))[::-1]
    asked = [random_ids(length, seed=n, vocab=VOCAB).tolist() for n, length in enumerate(lengths)]
    wide, device = widened(model), copy.deepcopy(model).cuda()
    exact, plain = Plain(wide, len(slots)), Plain(copy.deepcopy(device), len(slots))
    assert choose_executor(device, "decoding").name == "CUDA decoding"
    fused = FusedDecode(device, len(slots), 320)
    fused.prepare(len(slots))
    assert (fused.steps[len(slots)].few is not None) == few
    with torch.inference_mode():
        wanted = exact.read(asked, slots, [prefixes_of(wide)] * len(slots))
        prefixes = prefixes_of(device)
        beside = plain.read(asked, slots, [prefixes] * len(slots))
        pieces = [Piece(*each, prefixes) for each in zip(asked, slots, strict=True)]
        for read in ways_to_read(fused, pieces):
            assert distance(read(), wanted) < 1.5 * distance(beside, wanted)
        assert {size for _, size in fused.short_reads} in ({1, fused.tile_size}, set())
        token = random_ids(len(slots), vocab=VOCAB)
        for n in range(3):
            position = torch.tensor(lengths[::-1]) + n
            found, beside = (
                fused.captured_step(token.cuda(), position.cuda(), 320),
                plain.step(token, position),
            )
            wanted = exact.step(token, position)
            assert distance(found, wanted) < 1.5 * distance(beside, wanted)
            token = wanted.argmax(-1)
        assert distance(fused.cache.k, exact.cache.k) < 0.03
        assert distance(fused.cache.v, exact.cache.v) < 0.03


@pytest.mark.parametrize("rank", [0, 3])
def test_a_base_in_fp8_is_decoded_in_fp8(rank: int) -> None:
    """As near to its own forward pass as fp8 allows: noise of bf16's size in the input moves it by 0.2."""
    from lit_adapter.model.fused_decode import FusedDecode

    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("fp8 needs compute capability 9")
    form = AdapterConfig(layers=2, prompt_length=5, lora=LoraConfig(rank=rank))
    model = open_adapter(adapted(4, 2, 64, None), form, seed=2).requires_grad_(False).cuda()
    prepare(model, float8=True)
    for lengths in ([40], [3, 70, 12]):
        slots = list(range(len(lengths)))
        asked = [random_ids(length, seed=length, vocab=VOCAB).tolist() for length in lengths]
        plain, found, prefixes = (
            Plain(model, len(slots)),
            FusedDecode(model, len(slots), 320),
            prefixes_of(model),
        )
        with torch.inference_mode():
            wanted = plain.read(asked, slots, [prefixes] * len(slots)).double().cpu()
            pieces = [Piece(*each, prefixes) for each in zip(asked, slots, strict=True)]
            assert distance(found.read(pieces), wanted) < 0.4
            token, position = random_ids(len(slots), vocab=VOCAB), torch.tensor(lengths)
            wanted = plain.step(token, position).double().cpu()
            assert distance(found.captured_step(token.cuda(), position.cuda(), 320), wanted) < 0.4


KINDS: list[AdapterConfig | None] = [
    paper(layers=2, prompt_length=5),
    paper(layers=1, prompt_length=17, gate="channel"),
    None,
    paper(layers=3, prompt_length=1, gate="layer", norms=True),
    paper(layers=2, prompt_length=64, gate="token"),
    paper(layers=3, prompt_length=10, prefix_query="unrotated"),
    AdapterConfig(layers=2, prompt_length=5, prefix_query="unrotated"),
    AdapterConfig(layers=1, prompt_length=30),
]
"""Both prompts alone and, as the default is, with norms."""


def eight(base: Llama) -> list[Llama]:
    """The base with eight different adapters, one of them none, sharing its weights."""
    models = []
    for seed, config in enumerate(KINDS):
        model = copy.deepcopy(base)
        models.append(model if config is None else open_adapter(model, config, seed=seed))
        model.requires_grad_(False)
    return models


def in_pieces(executor: ModuleDecode, pieces: list[Piece]) -> list[Piece]:
    """What is left of some prompts, of which some tokens have been read."""
    executor.read([replace(piece, prompt=piece.prompt[: 1 + piece.slot]) for piece in pieces])
    return [replace(piece, done=min(piece.slot, len(piece.prompt) - 1)) for piece in pieces]


@pytest.mark.parametrize("heads", [(4, 2, 64), (4, 4, 32), (8, 1, 32)], ids=["gqa", "mha", "mqa"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("n_slots", [8, 40])
def test_every_slot_has_its_own_adapter(heads: tuple[int, int, int], family: str, n_slots: int) -> None:
    """With its norms, also after slots have changed adapters, and where the longest prompt comes late."""
    from lit_adapter.model.fused_decode import FusedDecode

    base = adapted(*heads, None, family=family)
    models = eight(base)
    wide_base, device, slots = widened(base), copy.deepcopy(base).cuda(), list(range(n_slots))
    wide = [bound(wide_base, widened(model)).prefixes for model in models]
    narrow = [bound(device, copy.deepcopy(model).cuda()).prefixes for model in models]
    asked = [random_ids(3 + 7 * n % 90, seed=n, vocab=VOCAB).tolist() for n in slots]
    exact, plain = Plain(wide_base, n_slots), Plain(copy.deepcopy(device), n_slots)
    fused = FusedDecode(device, n_slots, 320)
    with torch.inference_mode():
        for shift in (0, 3):
            owner = [(slot + shift) % len(models) for slot in slots]
            wanted = exact.read(asked, slots, [wide[n] for n in owner])
            beside = plain.read(asked, slots, [narrow[n] for n in owner])
            pieces = [Piece(asked[slot], slot, narrow[n]) for slot, n in zip(slots, owner, strict=True)]
            for asked_for in (pieces, in_pieces(fused, pieces)):
                for read in ways_to_read(fused, asked_for):
                    found = read()
                    assert distance(found, wanted) < 1.5 * distance(beside, wanted)
                    for slot in slots:
                        assert distance(found[slot], wanted[slot]) < 3 * distance(beside, wanted) + 0.01
            token = random_ids(n_slots, vocab=VOCAB)
            for n in range(3):
                position = torch.tensor([len(prompt) for prompt in asked]) + n
                wanted, beside = exact.step(token, position), plain.step(token, position)
                found = fused.captured_step(token.cuda(), position.cuda(), 320)
                assert distance(found, wanted) < 1.5 * distance(beside, wanted)
                for slot in slots:  # no row may hide behind the others
                    assert distance(found[slot], wanted[slot]) < 3 * distance(beside, wanted) + 0.01
                token = wanted.argmax(-1)


def join_one_by_one(asked: list[list[int]], how: list[Sampling], adapters: list[Adapter]) -> list[list[int]]:
    """The answers of requests of which one more joins with every step."""
    engine = Engine()
    requests = [Request(*each) for each in zip(asked, how, adapters, strict=True)]
    waiting = list(requests)
    while waiting or not all(request.ended for request in requests):
        if waiting:
            engine.add(waiting.pop())
        engine.step()
    assert all(request.error is None for request in requests)
    return [list(request.news) for request in requests]


def test_mixed_requests_in_fp32_get_the_tokens_of_the_cpu() -> None:
    base = adapted(4, 2, 32, None).float()
    models, device = eight(base), copy.deepcopy(base).cuda()
    adapters = [bound(device, copy.deepcopy(model).cuda()) for model in models]
    asked = [random_ids(5 + 11 * n, seed=n, vocab=VOCAB).tolist() for n in range(len(models))]
    how = [Sampling(max_new_tokens=20 + 3 * n) for n in range(len(models))]
    how[1] = Sampling(max_new_tokens=30, temperature=1.0, seed=1)
    how[5] = Sampling(max_new_tokens=25, temperature=0.8, top_k=20, repetition_penalty=1.3, seed=5)
    found = join_one_by_one(asked, how, adapters)
    for prompt, its, model, tokens in zip(asked, how, models, found, strict=True):
        request = Request(prompt, its, bound(base, model))
        assert [token for _, token in Engine().run([request])] == [*tokens, None]


def test_mixed_requests_follow_each_its_own_model() -> None:
    """Fused steps: every token is the likeliest with the request's adapter, or as likely within rounding."""
    base = adapted(4, 2, 32, None)
    models, device = eight(base), copy.deepcopy(base).cuda()
    adapters = [bound(device, copy.deepcopy(model).cuda()) for model in models]
    asked = [random_ids(5 + 11 * n, seed=n, vocab=VOCAB).tolist() for n in range(len(models))]
    how = [Sampling(max_new_tokens=20 + 3 * n) for n in range(len(models))]
    for prompt, model, tokens in zip(asked, models, join_one_by_one(asked, how, adapters), strict=True):
        wide, ids = widened(model), torch.tensor([prompt + tokens])
        with torch.no_grad():
            hidden = wide(ids, CausalView(wide.rotation(torch.arange(ids.shape[1])[None])))
        logits = wide.logits(hidden)[0, len(prompt) - 1 : -1]
        taken = logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        assert (logits.amax(-1) - taken < 0.2 * logits.std()).all()


def products_against_formulas(
    B: int, C: int, M: int, heads: tuple[int, int, int], dtype: torch.dtype, device: str
) -> list[tuple[Tensor, Tensor]]:
    """What every product of a step gives beside what its formula gives in fp64, from the same numbers."""
    from lit_adapter.model.kernels.decode_products import Products

    (H, G, D), S, eps, generator = heads, 9, 1e-5, torch.Generator().manual_seed(B)

    def drawn(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(device, dtype)

    x, norm, y = drawn(B, C) * C**0.5, drawn(C) * C**0.5, drawn(B, M)
    q_weight, k_weight, v_weight = drawn(H * D, C), drawn(G * D, C), drawn(G * D, C)
    gate, up, down = drawn(M, C), drawn(M, C), drawn(C, M)
    position = torch.arange(B, device=device) % S
    cos, sin = (torch.rand(S, D // 2, generator=generator).to(device) for _ in range(2))
    q, hidden, logits = x.new_empty(B, H * D), x.new_empty(B, M), x.new_empty(B, M, dtype=torch.float32)
    cache = (x.new_zeros(B, G, S, D), x.new_zeros(B, G, S, D))
    norm = norm.float() if B % 2 else norm  # as a trained norm's
    products, total = Products(x), x.clone()
    weights, biases = (q_weight, k_weight, v_weight), (None, None, None)
    products.project(x, norm, eps, weights, biases, (cos, sin), position, q, cache)
    products.gate_up(x, norm, eps, gate, up, hidden)
    products.norm_linear(x, norm, eps, gate, logits)
    for _ in range(2):  # what counts the programs that have finished begins anew
        products.add_linear(y, down, total)

    wide = x.double()
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * norm.double()

    def turned(weight: Tensor) -> Tensor:
        first, second = (normed @ weight.double().T).view(B, -1, 2, D // 2).unbind(2)
        c, s = cos.double()[position, None], sin.double()[position, None]
        return torch.cat([first * c - second * s, second * c + first * s], -1)

    slot, heads_of_v = torch.arange(B), (normed @ v_weight.double().T).view(B, G, D)
    return [
        (q.view(B, H, D), turned(q_weight)),
        (cache[0][slot, :, position], turned(k_weight)),
        (cache[1][slot, :, position], heads_of_v),
        (hidden, torch.nn.functional.silu(normed @ gate.double().T) * (normed @ up.double().T)),
        (logits, normed @ gate.double().T),
        (total, wide + 2 * y.double() @ down.double().T),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("B", "C", "M", "heads"),
    [
        (1, 130, 71, (3, 1, 16)),
        (2, 130, 64, (2, 2, 128)),
        (16, 576, 1536, (9, 3, 64)),
        (17, 257, 300, (4, 2, 32)),
        (32, 322, 517, (3, 3, 64)),
    ],
)
def test_products_of_a_step_follow_their_formulas(
    B: int, C: int, M: int, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    for found, wanted in products_against_formulas(B, C, M, heads, dtype, "cuda"):
        assert distance(found, wanted.cpu()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "V"), [(1, 509), (5, 4096), (3, 32001)])
def test_the_likeliest_tokens_are_chosen_and_counted(B: int, V: int, dtype: torch.dtype) -> None:
    from lit_adapter.model.kernels import greedy

    generator = torch.Generator("cuda").manual_seed(V)
    logits = torch.randn(B, V, device="cuda", generator=generator).to(dtype)
    logits[0, [3, V - 1]] = 99.0  # equals: the first is taken
    logits[1:2, V // 2] = torch.nan
    logits[2:3, V // 2] = torch.inf
    logits[3:4] = -torch.inf
    place = torch.arange(2 * B, device="cuda").view(2, B)
    last_place = torch.tensor([[2], [100]], device="cuda")
    wanted = choose(logits, None)
    counted = torch.minimum(place + 1, last_place)
    chosen, token = torch.empty_like(wanted), torch.empty_like(wanted)
    greedy.advance(logits, chosen, token, place, last_place)
    assert chosen.tolist() == wanted.tolist()
    assert token.tolist() == wanted.clamp(min=0).tolist()
    assert place.tolist() == counted.tolist()


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
    wanted = answers(model, how, 1)
    for batch_size in (1, 3, len(LENGTHS)):
        assert answers(device, how, batch_size) == wanted


@pytest.mark.parametrize(("batch_size", "long"), [(1, 10**9), (3, 1), (len(LENGTHS), 10**9)])
def test_fused_answers_follow_the_formula(
    batch_size: int, long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token is the likeliest of the written-out model, or as likely within bf16's rounding."""
    monkeypatch.setattr(graph_lane, "LONG", long)  # 1: a step is captured before the first token is read
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


def test_what_is_not_plain_takes_the_path_of_the_model() -> None:
    class Scaled(nn.Linear):
        pass

    plain = adapted(4, 2, 64, "tanh").cuda()
    wide = copy.deepcopy(plain).float()
    other = copy.deepcopy(plain)
    other.layers[1].mlp.up_proj.__class__ = Scaled
    odd = random_llama(0, torch.bfloat16, head_dim=24).cuda()
    assert choose_executor(plain, "decoding").name == "CUDA decoding"
    for model in (wide, other, odd):
        assert choose_executor(model, "decoding").why_not_fast
        assert list(decode(model, [[1, 2, 3]], Sampling(max_new_tokens=5), frozenset()))[-1] == (0, None)


@pytest.mark.parametrize("gate", [None, "tanh", "token unrotated norms"])
def test_the_rest_of_a_prompt_is_read_as_the_whole(gate: str | None) -> None:
    model = adapted(4, 2, 32, gate).cuda()
    prompt = random_ids(150, seed=3, vocab=VOCAB).tolist()
    prefixes = prefixes_of(model)
    with torch.inference_mode():
        whole, parts = (GraphLane(model) for _ in range(2))
        for lane in (whole, parts):
            lane._grow(3, 320)
        wanted = whole.executor.read([Piece(prompt, 1, prefixes)])
        found, middle = (
            [
                parts.executor.read([Piece(prompt[:end], slot, prefixes, done)])
                for done, end in itertools.pairwise((0, *ends))
            ][-1]
            for slot, ends in ((1, (90, 149, 150)), (2, (90, 150)))
        )
    for other in (found, middle):
        assert distance(other, wanted.double().cpu()) < 0.02
    for one in ("k", "v"):
        kept, again = (getattr(lane.executor.cache, one)[:, 1, :, :150] for lane in (whole, parts))
        assert distance(again, kept.double().cpu()) < 0.02
    assert type(parts.executor).__name__ == "FusedDecode"


@pytest.mark.parametrize("gate", [None, "tanh"])
def test_a_conversation_goes_on_in_captured_steps(gate: str | None) -> None:
    """Greedy answers in fp32, where rounding does not decide: as computed afresh, turn after turn."""
    model = adapted(4, 2, 32, gate).float().cuda()
    with torch.inference_mode():
        adapter = Adapter.of(model)
    own, prompt = Engine(), random_ids(40, seed=5, vocab=VOCAB).tolist()
    for turn in range(5):
        how = Sampling(max_new_tokens=12)
        going, fresh = Request(prompt, how, adapter, resumes=True), Request(prompt, how, adapter)
        for engine, request in ((own, going), (Engine(), fresh)):
            for _ in engine.run([request]):
                pass
        assert going.answer == fresh.answer
        assert going.computed == (40 if turn == 0 else 7)
        prompt = [*prompt, *going.answer, *random_ids(6, seed=turn, vocab=VOCAB).tolist()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_adapter_takes_of_the_device_what_decoding_reads(dtype: torch.dtype) -> None:
    """Prompts, gates and norms stay in the host's memory; likelihoods come out as with all of them there."""
    base, kept, asked = adapted(4, 2, 64, None).to(dtype), [], [1, 5, 9, 200, 7, 300, 11]
    form = AdapterConfig(layers=2, prompt_length=16, gate="token", norms=True)
    wide = open_adapter(copy.deepcopy(base), form, seed=2).requires_grad_(False).cuda()
    base.cuda()
    state = adapter_state(wide)
    for number in range(9):
        if number == 1:
            before = torch.cuda.memory_allocated()
        loaded: Any = Loaded(Path(), base, Engine())
        kept.append(AdaptedLlama(attached(base, form, state, "it"), *[None] * 2, loaded))  # type: ignore[arg-type]
        kept[-1].spare_device()
    each = (torch.cuda.memory_allocated() - before) / 8
    stacked = kept[0].adapter.prefixes.stacked
    sizes = [x.nbytes for x in vars(stacked).values() if isinstance(x, Tensor)]
    assert each <= sum(-(-size // 512) * 512 for size in sizes)
    assert kept[0].adapter.model is base
    found = [likelihoods(model, [Scored(asked, 2)])[0].log_likelihood for model in (kept[0].model, wide)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    values = [x.log_probability for x in prompt_likelihoods(kept[0].model, asked, 0)]
    assert values == pytest.approx([x.log_probability for x in prompt_likelihoods(wide, asked, 0)], rel=1e-6)
