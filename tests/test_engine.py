"""Requests of one batch, each with its own adapter and settings, are answered as each alone."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_fixtures import save_random_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import open_adapter, random_ids, random_llama

import lit_adapter
from lit_adapter.errors import UserError
from lit_adapter.generation.adapted import AdaptedLlama, Loaded
from lit_adapter.generation.adapter import Adapter, attached
from lit_adapter.generation.engine import Engine
from lit_adapter.generation.lane import Lane
from lit_adapter.generation.request import NonFiniteLogitsError, Request
from lit_adapter.generation.settings import Sampling
from lit_adapter.model import cache, cpu_decode, pieces
from lit_adapter.model.adapter import adapter_parameters, adapter_shapes, adapter_state
from lit_adapter.model.cache import ModuleDecode
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.cpu_decode import CpuDecode
from lit_adapter.model.executors import Setting
from lit_adapter.model.llama import Llama, empty_llama
from lit_adapter.model.norms import normed
from lit_adapter.model.pieces import Piece
from lit_adapter.model.slot_prefixes import SlotPrefixes

KINDS: list[AdapterConfig | None] = [
    AdapterConfig(layers=2, prompt_length=4, norms=False),
    AdapterConfig(layers=1, prompt_length=7, gate="channel"),
    None,
    AdapterConfig(layers=3, prompt_length=1, gate="layer", norms=False),
    AdapterConfig(layers=2, prompt_length=9, gate="token"),
    AdapterConfig(layers=3, prompt_length=5, prefix_query="unrotated"),
    AdapterConfig(layers=2, prompt_length=4, gate="token", prefix_query="unrotated"),
    AdapterConfig(layers=1, prompt_length=2, norms=False),
]
V2 = AdapterConfig(version="v2", layers=2, prompt_length=3, head=True)
HOW = [
    Sampling(max_new_tokens=9),
    Sampling(max_new_tokens=14, temperature=1.2, seed=3),
    Sampling(max_new_tokens=11, temperature=0.8, top_p=0.9, top_k=30, seed=4),
    Sampling(max_new_tokens=17, repetition_penalty=1.4),
    Sampling(max_new_tokens=6, temperature=1.0, min_p=0.05, repetition_penalty=0.8, seed=5),
    Sampling(max_new_tokens=12, stop_ids=(3, 9, 20, 41, 55)),
    Sampling(max_new_tokens=1),
    Sampling(max_new_tokens=10, temperature=1.5, seed=3),
]
PROMPTS = [random_ids(length, seed=length).tolist() for length in (5, 1, 17, 9, 10, 2, 30, 6)]


def base_of(dtype: torch.dtype = torch.float32, **sizes: Any) -> Llama:
    return random_llama(1, dtype, **{"n_kv_head": 2, **sizes}).eval()


def adapter_of(base: Llama, config: AdapterConfig | None, seed: int) -> Adapter:
    return Adapter.of(base) if config is None else Adapter.of(model_of(base, config, seed), base)


def model_of(base: Llama, config: AdapterConfig, seed: int) -> Llama:
    state = adapter_state(open_adapter(copy.deepcopy(base), config, seed=seed))
    model = attached(base, config, state, "it")
    for _, parameter in adapter_parameters(model):
        parameter.data = parameter.data.to(torch.promote_types(torch.float32, base.embed_tokens.weight.dtype))
    return model


def eight(base: Llama) -> list[Adapter]:
    return [adapter_of(base, config, seed) for seed, config in enumerate(KINDS)]


def alone(number: int, adapters: list[Adapter]) -> list[int]:
    request = Request(PROMPTS[number], HOW[number], adapters[number])
    return [token for _, token in Engine().run([request]) if token is not None]


def together(adapters: list[Adapter], batch_size: int = 8) -> list[list[int]]:
    requests = [Request(*each) for each in zip(PROMPTS, HOW, adapters, strict=True)]
    found: list[list[int]] = [[] for _ in requests]
    for index, token in Engine().run(requests, batch_size):
        if token is not None:
            found[index].append(token)
    return found


@pytest.mark.parametrize(
    "sizes", [{}, {"n_kv_head": 4}, {"attention_bias": True}], ids=["gqa", "mha", "biased"]
)
def test_eight_requests_with_eight_adapters_and_settings(sizes: dict[str, Any]) -> None:
    """By joined matrices, and by the modules where biases need them."""
    adapters = eight(base_of(**sizes))
    assert len({adapter.model for adapter in adapters}) == 1
    wanted = [alone(number, adapters) for number in range(8)]
    assert len({tuple(tokens) for tokens in wanted}) == 8
    for batch_size in (8, 3):
        assert together(adapters, batch_size) == wanted


@pytest.mark.parametrize("executor", [CpuDecode, ModuleDecode])
def test_logits_of_mixed_slots_are_those_of_each_alone(executor: Callable[..., Any]) -> None:
    base = base_of(torch.float64)
    adapters = eight(base)
    assert [slot for slot in range(8) if adapters[slot].prefixes.norms] == [1, 4, 5, 6]
    prefixes = [adapter.prefixes for adapter in adapters]
    with torch.inference_mode():
        mixed = executor(base, 8, 40)
        singles = [executor(base, 1, 40) for _ in prefixes]
        for slot, (its, prompt, single) in enumerate(zip(prefixes, PROMPTS, singles, strict=True)):
            found = mixed.read([Piece(prompt, slot, its)])
            assert torch.equal(found, single.read([Piece(prompt, 0, its)]))
        for n in range(4):
            token, position = [7 + n] * 8, [len(prompt) + n for prompt in PROMPTS]
            found = mixed.step(token, position)
            wanted = torch.cat(
                [single.step(token[:1], [at]) for single, at in zip(singles, position, strict=True)]
            )
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        mixed.move(5, 2, 2)  # a slot that another request took over
        found = mixed.step([7] * 3, [len(PROMPTS[n]) for n in (0, 1, 5)])
        wanted = torch.cat([singles[n].step([7], [len(PROMPTS[n])]) for n in (0, 1, 5)])
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mha": {"n_kv_head": 4},
    "norms of heads": {"head_norms": True},
    "windows": {"window": 3, "windowed_layers": (1,), "unrotated_layers": (2,)},
}


@pytest.mark.parametrize("sizes", FAMILIES.values(), ids=FAMILIES)
def test_prompts_of_different_adapters_read_in_one_pass_are_as_if_each_were_alone(
    sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base without an adapter among them; whole prompts, rests of some, and a start that two share."""
    base, passes, forward = base_of(torch.float64, **sizes), [], Llama.forward
    monkeypatch.setattr(pieces, "LEAST_SAVED", 12)
    start, adapters = random_ids(14, seed=77).tolist(), eight(base)
    prompts = [*PROMPTS, [*start, *PROMPTS[0]], [*start, *PROMPTS[6]]]
    own = [adapter.prefixes for adapter in (*adapters, adapters[0], adapters[0])]
    slots = [(7 * n + 3) % len(prompts) for n in range(len(prompts))]
    whole = [Piece(*each) for each in zip(prompts, slots, own, strict=True)]
    begun = [piece for piece in whole[:8:2] if piece.n_new > 4]
    with torch.inference_mode():
        single, together = (ModuleDecode(base, len(prompts), 60) for _ in range(2))
        wanted = torch.cat([single.read([piece]) for piece in whole])
        together.read([replace(p, slot=at) for p, at in zip(whole, slots[::-1], strict=True)])
        together.read([replace(piece, prompt=piece.prompt[:4]) for piece in begun])
        rest = [replace(piece, done=4 if piece in begun else 0) for piece in whole]
        monkeypatch.setattr(Llama, "forward", lambda *given: passes.append(given[1].shape) or forward(*given))
        found = together.read(rest)
    n_left = sum(map(len, prompts)) - 4 * len(begun) - 2 * len(start)
    assert passes == [(1, len(start)), (1, n_left)]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    for piece in whole:
        at = (slice(None), piece.slot, slice(None), slice(len(piece.prompt)))
        for kept, exact in ((together.cache.k, single.cache.k), (together.cache.v, single.cache.v)):
            torch.testing.assert_close(kept[at], exact[at], rtol=1e-10, atol=1e-10)
    monkeypatch.setattr(cache, "LONGEST_ROW", 20)
    with torch.inference_mode():  # again, in several rows
        torch.testing.assert_close(together.read(rest), wanted, rtol=1e-10, atol=1e-10)
    assert len(passes) > 5


def test_slots_that_have_their_adapters_are_not_written_again() -> None:
    base = base_of(head_norms=True)
    own, slots = [adapter.prefixes for adapter in eight(base)], SlotPrefixes(base, 3)

    def written() -> list[int]:
        tensors = [*vars(slots.joined.stacked).values(), *vars(slots.joined.norms).values(), slots.source]
        return [x._version for x in tensors if isinstance(x, torch.Tensor)]

    slots.assign({0: own[1], 1: own[4], 2: own[2]})
    before = written()
    slots.assign({0: own[1], 2: own[2]})
    assert written() == before
    slots.assign({0: own[2], 1: own[4]})
    assert all(now > then for now, then in zip(written(), before, strict=True))


@pytest.mark.parametrize("sizes", [{}, {"head_norms": True}], ids=["llama", "norms of heads"])
def test_adapters_with_norms_share_steps_with_others(sizes: dict[str, Any]) -> None:
    """With prefixes alone, and with the base; an adapter of linear layers has a lane of its own."""
    base = base_of(**sizes)
    forms = [replace(KINDS[5] or V2, norms=True), AdapterConfig(norms=True, prompt_length=0), V2]
    adapters = eight(base)[:5] + [adapter_of(base, form, n) for n, form in enumerate(forms)]
    assert len({adapter.model for adapter in adapters}) == 2
    own = [Adapter.of(model_of(base, form, n)) for n, form in enumerate(forms[:2])]
    assert all(adapter.prefixes.norms is None for adapter in own)
    wanted = [alone(number, adapters) for number in range(8)]
    assert [alone(number, [*adapters[:5], *own, adapters[7]]) for number in range(8)] == wanted
    for batch_size in (8, 3):
        assert together(adapters, batch_size) == wanted
    assert alone(6, eight(base)) != wanted[6] or alone(5, eight(base)) != wanted[5]


@pytest.mark.parametrize("gate", ["tanh", "token", "channel"])
def test_an_adapter_of_7b_takes_at_most_six_megabytes_of_the_device(gate: Any) -> None:
    """The meta device stands for a GPU: it has shapes alone. Prompts and gates stay in the host's memory."""
    sizes = {"vocab_size": 32000, "n_layer": 32, "n_head": 32, "n_kv_head": 32, "head_dim": 128}
    config = LlamaConfig(**sizes, n_embd=4096, n_hidden=11008)
    base = empty_llama(config).to(torch.bfloat16)
    form = AdapterConfig(gate=gate, norms=False)
    state = {name: torch.zeros(shape) for name, shape in adapter_shapes(form, config).items()}
    loaded: Any = Loaded(Path(), base, Engine())
    own = AdaptedLlama(attached(base, form, state, "it"), *[None] * 2, loaded)  # type: ignore[arg-type]
    assert own.adapter.model is base
    own.spare_device()
    decoded = [x for x in vars(own.adapter.prefixes.stacked).values() if isinstance(x, torch.Tensor)]
    assert {x.device.type for x in decoded} == {"meta"}
    assert sum(x.nbytes for x in decoded) <= 6e6
    assert {parameter.device.type for _, parameter in adapter_parameters(own.model)} == {"cpu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_each_row_are_those_of_one_model_to_the_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(5, 96, generator=generator) for _ in range(2))
    x, weights = x.to(dtype), weights + 1
    together = normed(x, weights, 1e-5)
    for n, weight in enumerate(weights):
        doubled = torch.cat((weight, torch.zeros_like(weight)))
        assert torch.equal(together[n : n + 1], normed(x[n : n + 1], doubled, 1e-5))


@pytest.mark.slow
@settings(max_examples=25)
@given(st.data())
def test_joining_and_leaving_in_any_order_changes_nobodys_answer(data: st.DataObject) -> None:
    base = base_of()
    adapters = [*eight(base)[:6], adapter_of(base, AdapterConfig(norms=True), 6), adapter_of(base, V2, 7)]
    waiting = data.draw(st.permutations(range(8)))
    requests = {number: Request(PROMPTS[number], HOW[number], adapters[number]) for number in waiting}
    found: dict[int, list[int]] = {number: [] for number in waiting}
    engine, cancelled, running = Engine(), set(), []
    while waiting or running:
        for _ in range(data.draw(st.integers(0 if running else 1, 3))):
            if waiting:
                running.append(waiting.pop())
                engine.add(requests[running[-1]])
        if running and data.draw(st.integers(0, 9)) == 0:
            leaving = data.draw(st.sampled_from(running))
            cancelled.add(leaving)
            engine.cancel(requests[leaving])
        engine.step()
        for number in list(running):
            while requests[number].news:
                found[number].append(requests[number].news.popleft())
            if requests[number].ended:
                running.remove(number)
    assert not engine._lanes
    for number, tokens in found.items():
        wanted = alone(number, adapters)
        assert tokens == (wanted[: len(tokens)] if number in cancelled else wanted)


def test_a_cancelled_request_frees_its_slot_and_the_last_one_the_cache() -> None:
    base, engine = base_of(), Engine()
    adapters = eight(base)
    first, second, third = (Request(PROMPTS[n], Sampling(max_new_tokens=8), adapters[n]) for n in range(3))
    engine.add(first)
    engine.add(second)
    engine.step()
    (lane,) = engine._lanes.values()
    engine.cancel(first)
    assert lane.live == [second]
    engine.add(third)
    engine.step()
    assert lane.slots == [third, second]
    assert lane.executor.cache.n_slots == 2
    engine.cancel(second)
    engine.step()
    assert lane.live == [third]
    assert not second.news
    engine.cancel(third)
    assert not engine._lanes


def test_an_error_ends_one_request_alone() -> None:
    base, engine = base_of(), Engine()
    state = adapter_state(open_adapter(copy.deepcopy(base), KINDS[0] or V2))
    model = attached(base, KINDS[0] or V2, state, "it")
    model.layers[2].self_attn.prefix.gate.fill_(float("nan"))
    how, adapters = Sampling(max_new_tokens=8), eight(base)
    good, bad = Request(PROMPTS[0], how, adapters[1]), Request(PROMPTS[0], how, Adapter.of(model, base))
    engine.add(good)
    engine.add(bad)
    while not good.ended:
        engine.step()
    assert isinstance(bad.error, NonFiniteLogitsError)
    assert good.error is None
    assert (
        list(good.news) == [token for _, token in Engine().run([Request(PROMPTS[0], how, adapters[1])])][:-1]
    )
    with pytest.raises(UserError, match="NaN or infinite"):
        list(Engine().run([Request(PROMPTS[0], how, adapters[1]), Request(PROMPTS[0], how, bad.adapter)], 2))


@pytest.mark.parametrize("sizes", [{}, {"attention_bias": True}], ids=["plain", "biased"])
def test_a_slot_keeps_nothing_of_a_request_that_failed(sizes: dict[str, Any]) -> None:
    """By joined matrices, and by the modules: steps read as much of every slot as the longest text has."""
    base, engine = base_of(**sizes), Engine()
    form = AdapterConfig(layers=3, prompt_length=2)
    model = attached(base, form, adapter_state(open_adapter(copy.deepcopy(base), form)), "it")
    model.layers[-3].self_attn.prefix.gate.fill_(float("nan"))
    adapters, how = eight(base), Sampling(max_new_tokens=8)
    bad, long = Request(PROMPTS[6], how, Adapter.of(model, base)), Request(PROMPTS[6], how, adapters[1])
    short = Request(PROMPTS[5], how, adapters[2])  # will be moved to the failed one's place
    for request in (bad, long, short):
        engine.add(request)
    while not (long.ended and short.ended):
        engine.step()
    assert isinstance(bad.error, NonFiniteLogitsError)
    assert short.error is None
    wanted = [token for _, token in Engine().run([Request(PROMPTS[5], how, adapters[2])])]
    assert list(short.news) == wanted[: len(short.news)]


def test_an_adapter_for_which_there_is_no_room_leaves_the_other_slots_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = base_of()
    adapters = [adapter_of(base, AdapterConfig(layers=2, prompt_length=K), K).prefixes for K in (3, 9)]
    decode = ModuleDecode(base, 2, 40)
    with torch.inference_mode():
        decode.read([Piece(PROMPTS[2], 0, adapters[0])])
        wanted = decode.step([7, 7], [len(PROMPTS[2]), 0])
        with monkeypatch.context() as patch:
            patch.setattr(SlotPrefixes, "_write", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
            with pytest.raises(MemoryError, match="no room"):
                decode.read([Piece(PROMPTS[0], 1, adapters[1])])
        assert torch.equal(decode.step([7, 7], [len(PROMPTS[2]), 0])[0], wanted[0])


def test_prompts_that_cannot_be_read_are_their_owners_error(monkeypatch: pytest.MonkeyPatch) -> None:
    base, engine = base_of(), Engine()
    adapters = eight(base)
    first = Request(PROMPTS[0], HOW[0], adapters[0])
    engine.add(first)
    engine.step()
    second = Request(PROMPTS[1], HOW[1], adapters[1])
    engine.add(second)
    with monkeypatch.context() as patch:
        patch.setattr(CpuDecode, "read", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
        engine.step()
    assert isinstance(second.error, MemoryError)
    while not first.ended:
        engine.step()
    assert list(first.news) == alone(0, adapters)


@pytest.fixture(scope="module")
def models(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[AdaptedLlama]:
    """The plain base, two adapters, and one that trains norms, biases and scales, on one base."""
    folder = tmp_path_factory.mktemp("adapters")
    form = AdapterConfig(norms=False)
    paths = [save_random_adapter(tiny_base, folder / f"{seed}.safetensors", seed, form) for seed in range(2)]
    paths.append(save_random_adapter(tiny_base, folder / "v2.safetensors", 2, AdapterConfig(version="v2")))
    first = lit_adapter.load(paths[0], tiny_base, device="cpu", dtype="float32")
    return [first.base, first, *(first.with_adapter(path) for path in paths[1:])]


def test_threads_and_a_half_read_stream_keep_their_own_adapters(models: list[AdaptedLlama]) -> None:
    how = {"max_new_tokens": 30}
    wanted = [model.generate("Say it back.", **how) for model in models]
    assert len(set(wanted)) == len(models)
    frozen = {name: (id(p), p.clone()) for name, p in models[0].model.named_parameters()}
    streams = [model.stream("Say it back.", **how) for model in models]
    begun = [next(stream) for stream in streams]
    found: dict[int, list[str]] = {number: [] for number in range(len(models))}

    def ask(number: int) -> None:
        for _ in range(3):
            found[number].append(models[number].generate("Say it back.", **how))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [text] * 3 for number, text in enumerate(wanted)}
    assert [first + "".join(rest) for first, rest in zip(begun, streams, strict=True)] == wanted
    for name, parameter in models[0].model.named_parameters():
        assert id(parameter) == frozen[name][0]
        assert torch.equal(parameter, frozen[name][1])


def test_closing_a_half_read_stream_cancels_its_request(models: list[AdaptedLlama]) -> None:
    engine = models[0].engine
    stream = models[1].stream("Say it back.", max_new_tokens=30)
    next(stream)
    assert engine._lanes
    stream.close()
    assert not engine._lanes


def test_other_adapters_share_every_weight(models: list[AdaptedLlama]) -> None:
    """Also after decoding has moved them side by side."""
    for model in models:
        model.generate("x", max_new_tokens=3)
    assert cpu_decode.unsupported(models[0].model, Setting.of(models[0].model)) is None
    own = {p.untyped_storage().data_ptr() for p in models[0].model.parameters()}
    for model in models[1:]:
        frozen = {
            n: p for n, p in model.model.named_parameters() if "prefix." not in n and "adapter_" not in n
        }
        assert {p.untyped_storage().data_ptr() for p in frozen.values()} == own


def test_a_model_that_is_trained_on_answers_with_what_it_has_learned(models: list[AdaptedLlama]) -> None:
    model = copy.deepcopy(models[1].model).requires_grad_(True)
    own = AdaptedLlama(model, models[1].tokenizer, models[1].template)
    assert own.generate("x", max_new_tokens=12) == models[1].generate("x", max_new_tokens=12)
    with torch.no_grad():
        for block in model.layers:
            if block.self_attn.prefix is not None:
                block.self_attn.prefix.gate.zero_()
    assert own.generate("x", max_new_tokens=12) == models[0].generate("x", max_new_tokens=12)
    with pytest.raises(ValueError, match="plain base"):
        _ = own.base


def test_an_interrupt_of_one_thread_ends_no_other_one_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another owner is told, whenever the interrupt comes; the engine goes on; nobody waits for ever."""
    model = open_adapter(random_llama(0, torch.float32), AdapterConfig(prompt_length=2)).requires_grad_(False)
    adapter, engine = Adapter.of(model.eval()), Engine()

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    for place in ("_read", "_step", "_choose"):
        other = Request([3, 4, 5], Sampling(max_new_tokens=4), adapter)
        engine.add(other)
        if place == "_step":
            engine.step()
        with monkeypatch.context() as patch:
            patch.setattr(Lane, place, interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        assert other.ended
        assert isinstance(other.error, RuntimeError)
        own = Request([3, 4, 5], Sampling(max_new_tokens=4), adapter)
        assert [token for _, token in engine.run([own])][-1] is None


def test_a_batch_size_of_0_is_refused() -> None:
    with pytest.raises(UserError, match="batch_size is 0; expected 1 or more"):
        next(Engine().run([], batch_size=0))


@pytest.mark.parametrize("most", [1, 3, 8])
def test_prompts_read_in_pieces_give_the_same_answers(most: int) -> None:
    """Of a few tokens in each step, between the steps of others, whose slots move meanwhile."""
    adapters = eight(base_of())
    wanted = [alone(number, adapters) for number in range(8)]
    engine = Engine()
    engine.prompt_tokens = most
    requests = [Request(*each, resumes=True) for each in zip(PROMPTS, HOW, adapters, strict=True)]
    first = Request(PROMPTS[0], Sampling(max_new_tokens=60), adapters[2])
    engine.add(first)
    engine.step()
    for request in requests[:5]:
        engine.add(request)
    n_steps = len(first.answer)
    for _ in range(4):
        engine.step()
        n_steps += 1
        assert len(first.answer) == n_steps  # its stream goes on while prompts are read
    assert any(0 < request.length < len(request.prompt) for request in requests[:5]) or most == 8
    for request in requests[5:]:
        engine.add(request)
    while not all(request.ended for request in requests):
        engine.step()
    assert [request.answer for request in requests] == wanted


def test_prompts_are_read_together_in_their_order_whatever_adapters_they_have() -> None:
    engine, adapters = Engine(), eight(base_of())
    engine.prompt_tokens = 8
    first = Request(PROMPTS[0], Sampling(max_new_tokens=40), adapters[0])
    engine.add(first)
    engine.step()
    waiting = [Request([5, 9, 3, n], Sampling(max_new_tokens=30), adapters[n % 2]) for n in range(6)]
    for request in waiting:
        engine.add(request)
    for n_begun in (2, 4, 6):
        engine.step()
        assert [n for n, request in enumerate(waiting) if request.answer] == list(range(n_begun))


def test_a_request_cancelled_while_its_prompt_is_read_frees_its_slot() -> None:
    engine, adapters = Engine(), eight(base_of())
    engine.prompt_tokens = 4
    first, second = (Request(PROMPTS[n], Sampling(max_new_tokens=30), adapters[n]) for n in (0, 6))
    engine.add(first)
    engine.step()
    engine.add(second)
    engine.step()
    (lane,) = engine._lanes.values()
    assert lane.reading == [second]
    engine.cancel(second)
    third = Request(PROMPTS[3], Sampling(max_new_tokens=3), adapters[3])
    engine.add(third)
    while not third.ended:
        engine.step()
    assert lane.executor.cache.n_slots == 2
    assert (
        third.answer == [t for _, t in Engine().run([Request(PROMPTS[3], third.settings, adapters[3])])][:-1]
    )
