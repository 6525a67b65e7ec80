"""Decoding and the Python interface, with random gates on a tiny base."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from generation_fixtures import decode, save_random_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from paper import paper
from tiny_models import open_adapter, random_ids, random_llama

import lit_adapter
from lit_adapter import device
from lit_adapter.errors import UserError
from lit_adapter.generation import load
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.generation.adapter import Adapter
from lit_adapter.generation.engine import Engine
from lit_adapter.generation.request import Request
from lit_adapter.generation.settings import Sampling
from lit_adapter.model.attention import CausalView
from lit_adapter.model.layout import base_shapes
from lit_adapter.model.llama import Llama
from lit_adapter.weights.base_folder import read_config

HEADS = {"mha": 4, "gqa": 2, "mqa": 1}
STOPS = frozenset({3, 9, 20, 41, 55})
LENGTHS = (5, 1, 17, 9, 9, 2, 30)


def tiny(n_kv_head: int = 2, **form: Any) -> Llama:
    model = random_llama(1, torch.float32, n_kv_head=n_kv_head).eval()
    return open_adapter(model, paper(layers=2, prompt_length=4, **form), seed=2)


def prompts() -> list[list[int]]:
    return [random_ids(length, seed=length + 50 * n).tolist() for n, length in enumerate(LENGTHS)]


def uncached(model: Llama, prompt: list[int], n_new: int) -> list[int]:
    """Greedy decoding by a whole forward pass for every token."""
    ids = list(prompt)
    for _ in range(n_new):
        now = torch.tensor([ids])
        position = torch.arange(len(ids)).expand_as(now)
        with torch.no_grad():
            ids.append(model.logits(model(now, CausalView(model.rotation(position))))[0, -1].argmax().item())
    return ids[len(prompt) :]


def answers(
    model: Llama, asked: list[list[int]], how: Sampling, batch_size: int = 1, stops: frozenset[int] = STOPS
) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in asked]
    ended = []
    for number, token in decode(model, asked, how, stops, batch_size=batch_size):
        assert number not in ended
        if token is None:
            ended.append(number)
        else:
            found[number].append(token)
    assert sorted(ended) == list(range(len(asked)))
    return found


FORMS: list[dict[str, Any]] = [
    {},
    {"gate": "channel", "prefix_query": "unrotated"},
    {"gate": "layer"},
    {"gate": "token"},
    {"gate": "token", "prefix_query": "unrotated", "norms": True},
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())) or "default")
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_cached_decoding_equals_repeated_full_passes(heads: int, form: dict[str, Any]) -> None:
    model = tiny(heads, **form)
    for prompt in prompts()[:3]:
        wanted = uncached(model, prompt, 12)
        assert answers(model, [prompt], Sampling(max_new_tokens=12), stops=frozenset()) == [wanted]
        end = next((place for place, token in enumerate(wanted) if token in STOPS), 12)
        assert answers(model, [prompt], Sampling(max_new_tokens=12)) == [wanted[:end]]


@pytest.mark.parametrize(
    "how",
    [
        Sampling(max_new_tokens=14),
        Sampling(max_new_tokens=14, temperature=1.5, seed=4),
        Sampling(max_new_tokens=14, temperature=1.0, top_p=0.9, repetition_penalty=1.4, seed=8),
        Sampling(max_new_tokens=14, repetition_penalty=1.2),
    ],
    ids=["greedy", "sampled", "penalised", "greedy-penalised"],
)
@pytest.mark.parametrize("heads", [4, 2], ids=["mha", "gqa"])
def test_a_batch_of_unequal_lengths_equals_single_runs(heads: int, how: Sampling) -> None:
    model, asked = tiny(heads), prompts()
    alone = [answers(model, [prompt], how)[0] for prompt in asked]
    assert len({len(tokens) for tokens in alone}) > 1  # some end early, so slots are refilled
    for batch_size in (2, 3, len(asked), 50):
        assert answers(model, asked, how, batch_size) == alone


@settings(max_examples=25)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 7), st.integers(0, 2**64 - 1))
def test_batches_of_any_shape_equal_single_runs(lengths: list[int], batch_size: int, seed: int) -> None:
    model = tiny()
    asked = [random_ids(length, seed=length + n).tolist() for n, length in enumerate(lengths)]
    how = Sampling(max_new_tokens=6, temperature=1.2, seed=seed)
    alone = [answers(model, [prompt], how)[0] for prompt in asked]
    assert answers(model, asked, how, batch_size) == alone


def test_the_repetition_penalty_sees_prompt_and_answer() -> None:
    model = tiny()
    free = answers(model, [[5, 6]], Sampling(max_new_tokens=30), stops=frozenset())[0]
    never = answers(model, [[5, 6]], Sampling(max_new_tokens=30, repetition_penalty=1e6), stops=frozenset())[
        0
    ]
    assert len(set(free)) < len(free)
    assert len({5, 6, *never}) == len(never) + 2


def test_the_consumer_can_end_one_text_of_a_batch() -> None:
    model, how = tiny(), Sampling(max_new_tokens=10)
    whole = answers(model, prompts()[:3], how, 3)
    engine, adapter = Engine(), Adapter.of(model)
    requests = [Request(prompt, how, adapter, STOPS) for prompt in prompts()[:3]]
    found: list[list[int]] = [[], [], []]
    for index, token in engine.run(requests, 3):
        if token is not None:
            found[index].append(token)
        if len(found[0]) == 2:
            engine.cancel(requests[0])
    assert found == [whole[0][:2], *whole[1:]]


def test_logits_that_are_nan_are_an_error() -> None:
    model = tiny()
    model.norm.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="logits are NaN or infinite; the base or the adapter is damaged"):
        answers(model, [[1, 2]], Sampling())


def test_a_text_at_a_time_is_answered_in_fp32_on_a_cpu_with_memory_for_it(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(**options: str) -> torch.dtype:
        return lit_adapter.load(base=tiny_base, device="cpu", **options).model.embed_tokens.weight.dtype

    monkeypatch.setattr(device, "_bf16_pays", lambda device: True)
    assert found() == found(dtype="auto") == torch.float32
    assert found(dtype="bfloat16") == torch.bfloat16
    n_bytes = 4 * sum(math.prod(shape) for shape in base_shapes(read_config(tiny_base)).values())
    monkeypatch.setattr(load, "free_bytes", lambda device: 2 * n_bytes - 1)
    assert found() == torch.bfloat16
    monkeypatch.setattr(load, "free_bytes", lambda device: None)
    assert found() == torch.float32


def test_logits_of_the_plain_base_equal_transformers(tiny_base: Path) -> None:
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        tiny_base.parent / "source", dtype=torch.float32
    ).eval()
    ours = lit_adapter.load(base=tiny_base, device="cpu", dtype="float32")
    ids = random_ids(2, 70, vocab=300)
    with torch.no_grad():
        wanted = theirs(ids).logits
    found = ours.logits(ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_generate_is_the_argmax_of_logits(model: AdaptedLlama) -> None:
    ids = model.template.encode_prompt(model.tokenizer, "Say it back.", "red blue")
    new: list[int] = []
    while len(new) < 20:
        new.append(model.logits(torch.tensor([[*ids, *new]]))[0, -1].argmax().item())
        assert new[-1] not in model.tokenizer.stop_ids  # else choose another prompt for this test
    assert model.generate("Say it back.", "red blue", max_new_tokens=20) == model.tokenizer.decode(new)


def test_generate_stream_and_batch_agree(model: AdaptedLlama) -> None:
    tasks = [("Say it back.", "red"), ("Repeat the words.", ""), ("Say it back.", "green lamp river stone")]
    for sampling in ({}, {"temperature": 1.0, "seed": 4}):
        alone = [model.generate(*task, max_new_tokens=25, **sampling) for task in tasks]
        assert ["".join(model.stream(*task, max_new_tokens=25, **sampling)) for task in tasks] == alone
        finished: list[int] = []
        found = model.generate_batch(
            tasks, batch_size=2, finished=finished.append, max_new_tokens=25, **sampling
        )
        assert found == alone
        assert sorted(finished) == [0, 1, 2]


def test_the_same_seed_gives_the_same_text(model: AdaptedLlama) -> None:
    def sample(seed: int) -> str:
        return model.generate("Say it back.", temperature=1.0, seed=seed, max_new_tokens=20)

    texts = [sample(seed) for seed in range(6)]
    assert texts == [sample(seed) for seed in range(6)]
    assert len(set(texts)) >= 5


@settings(max_examples=25)
@given(st.data())
def test_stop_texts_cut_where_they_begin(model: AdaptedLlama, data: st.DataObject) -> None:
    """Whatever stretch of an answer is the stop text, within a token or across several."""
    seed = data.draw(st.integers(0, 5))
    how = {"temperature": 1.0, "seed": seed, "max_new_tokens": 24}
    whole = model.generate("Say it back.", **how)
    begin = data.draw(st.integers(0, len(whole) - 1))
    stop = whole[begin : begin + data.draw(st.integers(1, 12))]
    absent = stop + "\0never"  # held back while it could still come, and then not lost
    pieces = list(model.stream("Say it back.", stop=(absent, stop), **how))
    assert "".join(pieces) == whole[: whole.index(stop)]
    assert "".join(model.stream("Say it back.", stop=(absent,), **how)) == whole


def test_stop_ids_end_the_answer(model: AdaptedLlama) -> None:
    ids = model.template.encode_prompt(model.tokenizer, "Say it back.")
    new = [token for _, token in decode(model.model, [ids], Sampling(max_new_tokens=12), frozenset())][:-1]
    unused = next(token for token in range(2, 300) if token not in new)
    for place in (0, 4, 11):
        wanted = model.tokenizer.decode(new[: new.index(new[place])])
        assert model.generate("Say it back.", max_new_tokens=12, stop_ids=(unused, new[place])) == wanted


def test_the_plain_base_is_a_view_of_its_own(model: AdaptedLlama, tiny_base: Path) -> None:
    plain = lit_adapter.load(base=tiny_base, device="cpu", dtype="float32")
    ids = random_ids(1, 20, vocab=300)
    with_adapter = model.logits(ids)
    assert torch.equal(model.base.logits(ids), plain.logits(ids))
    assert torch.equal(model.logits(ids), with_adapter)
    assert (with_adapter - plain.logits(ids)).abs().max() > 0.1
    prompt = model.template.encode_prompt(model.tokenizer, "Say it back.")
    for one in (model.base, model, model.base):
        wanted = model.tokenizer.decode(uncached(one.model, prompt, 12))
        assert one.generate("Say it back.", max_new_tokens=12) == wanted


def test_another_adapter_on_the_same_base(model: AdaptedLlama, tiny_base: Path, tmp_path: Path) -> None:
    path = save_random_adapter(tiny_base, tmp_path / "other.safetensors", seed=5)
    other, alone = (
        model.base.with_adapter(path),
        lit_adapter.load(path, tiny_base, device="cpu", dtype="float32"),
    )
    assert other.generate("x", max_new_tokens=12) == alone.generate("x", max_new_tokens=12)
    assert other.generate("x", max_new_tokens=12) != model.generate("x", max_new_tokens=12)
    frozen = {p.untyped_storage().data_ptr() for p in model.base.model.parameters()}
    own = {p.untyped_storage().data_ptr() for n, p in other.model.named_parameters() if ".prefix." not in n}
    assert own == frozen  # joined or not, no weight is there twice


def test_what_does_not_fit_the_context_names_the_numbers(model: AdaptedLlama) -> None:
    long = "red " * 3000
    n = len(model.template.encode_prompt(model.tokenizer, long))
    with pytest.raises(UserError, match=f"the prompt has {n} tokens, but the base's context is 1024"):
        model.generate(long)
    n = len(model.template.encode_prompt(model.tokenizer, "Say it back."))
    with pytest.raises(
        UserError, match=f"{n} tokens and max_new_tokens 1024 .* lower .* to {1024 - n} or less"
    ):
        model.generate("Say it back.", max_new_tokens=1024)
    assert (
        model.generate(
            "Say it back.", max_new_tokens=1024 - n, stop_ids=tuple(range(model.tokenizer.vocab_size))
        )
        == ""
    )


def test_a_misspelt_setting_is_named(model: AdaptedLlama) -> None:
    for call in (model.generate, lambda task, **given: model.generate_batch([(task, "")], **given)):
        with pytest.raises(UserError, match="'temprature'; did you mean 'temperature'"):
            call("x", temprature=1)


def test_a_task_is_a_text_a_pair_or_a_record(model: AdaptedLlama) -> None:
    tasks = [
        "Say it.",
        ("Say it.", "red"),
        ["Say it.", "red"],
        {"instruction": "Say it.", "input": "red", "n": 1},
    ]
    tasks += [{"instruction": "Say it.", "input": None}]
    wanted = [model.generate("Say it.", input, max_new_tokens=8) for input in ("", "red")]
    found = model.generate_batch(iter(tasks), max_new_tokens=8)
    assert wanted[0] != wanted[1]
    assert found == [wanted[0], wanted[1], wanted[1], wanted[1], wanted[0]]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("Say it.", r"tasks is of type str; expected a list of tasks: for one task, pass \[task\]"),
        ({"instruction": "Say it."}, "tasks is of type dict; expected a list of tasks"),
        ([("Say it.", "red", "x")], r"tasks\[0\] is .*'Say it.', 'red', 'x'.*; expected a str, a pair"),
        (["Say it.", {"instuction": "x"}], r"tasks\[1\] is .*; expected .* dict with the key 'instruction'"),
        ([("Say it.", None)], r"tasks\[0\] is"),
        ([{"instruction": 3}], r"tasks\[0\] is"),
        ([7], r"tasks\[0\] is 7; expected"),
        ([{"instruction": "x", "input": 0}], r"tasks\[0\] is .*'input': 0.*; expected"),
        ([{"instruction": "x", "input": []}], r"tasks\[0\] is .*'input': \[\].*; expected"),
        ([{"instruction": "x", "input": False}], r"tasks\[0\] is .*'input': False.*; expected"),
        (None, "^tasks is None; expected a list of tasks$"),
        (5, "^tasks is 5; expected a list of tasks$"),
    ],
)
def test_what_is_no_list_of_tasks_is_refused(model: AdaptedLlama, tasks: object, message: str) -> None:
    for call in (model.generate_batch, lambda tasks: model.choose_batch(tasks, choices=["a", "b"])):
        with pytest.raises(TypeError, match=message):
            call(tasks)
