"""The server, asked by real clients: its answers are those of the Python object, whatever else it does."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from generation_fixtures import save_random_adapter
from serving_fixtures import NAMES, Running, folder_of_adapters, running

import lit_adapter
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.generation.engine import Engine
from lit_adapter.generation.request import Request
from lit_adapter.generation.settings import Sampling
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.torch_internals import packs
from lit_adapter.serving.loading import load_adapters
from lit_adapter.serving.options import ServerOptions
from lit_adapter.serving.run import _warm_up

SAY = [{"role": "user", "content": "Say it back."}]
MODELS = ("base", *NAMES, "norms")


@pytest.fixture(scope="module")
def paths(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("served")
    found = folder_of_adapters(tiny_base, folder)
    form = AdapterConfig(version="v2")
    return found | {"norms": save_random_adapter(tiny_base, folder / "norms.safetensors", 7, form)}


@pytest.fixture(scope="module")
def server(tiny_base: Path, paths: dict[str, Path]) -> Iterator[Running]:
    with running(base=tiny_base, adapters=paths) as found:
        yield found


@pytest.fixture(scope="module")
def objects(tiny_base: Path, paths: dict[str, Path]) -> dict[str, AdaptedLlama]:
    """What the server's answers are compared with."""
    base = lit_adapter.load(base=tiny_base, device="cpu", dtype="float32")
    return {"base": base} | {name: base.with_adapter(path) for name, path in paths.items()}


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.v1, api_key="none", max_retries=0, timeout=250)


def chat(client: openai.OpenAI, name: str = "alpha", **more: Any) -> Any:
    given = {"model": name, "messages": SAY, "max_tokens": 12, "temperature": 0.0, **more}
    return client.chat.completions.create(**given)


def text_of(client: openai.OpenAI, name: str = "alpha", **more: Any) -> str:
    content: str = chat(client, name, **more).choices[0].message.content
    return content


@pytest.fixture(scope="module")
def base_name(tiny_base: Path) -> str:
    return tiny_base.resolve().name


def test_models_name_the_base_and_every_adapter(client: openai.OpenAI, base_name: str) -> None:
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {base_name, *NAMES, "norms"}
    for name, model in models.items():
        assert model.object == "model"
        assert (model.root, model.parent) == (base_name, None if name == base_name else base_name)
    assert client.models.retrieve("beta") == models["beta"]
    with pytest.raises(openai.NotFoundError, match="'betta' does not exist; did you mean 'beta'"):
        client.models.retrieve("betta")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "how", [{}, {"temperature": 1.2, "top_p": 0.9, "seed": 5}], ids=["greedy", "sampled"]
)
def test_an_answer_is_the_python_objects(
    client: openai.OpenAI, objects: dict[str, AdaptedLlama], base_name: str, name: str, how: dict[str, Any]
) -> None:
    wanted = objects[name].generate("Say it back.", max_new_tokens=12, **how)
    assert text_of(client, base_name if name == "base" else name, **how) == wanted


def test_a_system_and_a_user_message_are_instruction_and_input(
    client: openai.OpenAI, objects: dict[str, AdaptedLlama]
) -> None:
    parts = [{"type": "text", "text": "red "}, {"type": "text", "text": "river"}]
    messages = [{"role": "system", "content": "Say it back."}, {"role": "user", "content": parts}]
    wanted = objects["alpha"].generate("Say it back.", "red river", max_new_tokens=12)
    assert text_of(client, messages=messages) == wanted
    assert text_of(client, messages=[{"role": "system", "content": " "}, *SAY]) == text_of(client)


def test_earlier_turns_are_seen_and_their_start_is_not_computed_again(
    client: openai.OpenAI, objects: dict[str, AdaptedLlama]
) -> None:
    said: list[Any] = [{"role": "user", "content": "red"}]
    for turn in ("river", "stone"):
        answer = chat(client, messages=said, max_tokens=5)
        assert answer.choices[0].message.content == objects["alpha"].chat(said, max_new_tokens=5)
        said += [answer.choices[0].message.to_dict(), {"role": "user", "content": turn}]
    assert answer.usage.prompt_tokens_details.cached_tokens > 20


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.1, "seed": 3},
    {"temperature": 0.9, "seed": 4, "top_p": 0.8},
    {"temperature": 1.0, "seed": 5, "extra_body": {"top_k": 5}},
    {"temperature": 1.0, "seed": 6, "extra_body": {"min_p": 0.1}},
    {"extra_body": {"repetition_penalty": 1.5}},
    {"frequency_penalty": 1.3},
    {"presence_penalty": -0.7, "temperature": 1.0, "seed": 7},
]


def sampling(given: dict[str, Any], n_new: int) -> dict[str, Any]:
    """The settings of the Python object."""
    return {"max_new_tokens": n_new, "temperature": 0.0} | {
        key: value for key, value in (given | given.get("extra_body", {})).items() if key != "extra_body"
    }


@pytest.mark.parametrize("given", SETTINGS, ids=lambda given: "-".join(given))
def test_settings_mean_what_they_mean_to_the_python_object(
    client: openai.OpenAI, objects: dict[str, AdaptedLlama], given: dict[str, Any]
) -> None:
    wanted = objects["beta"].generate("Say it back.", **sampling(given, 20))
    assert text_of(client, "beta", **{"max_tokens": 20, **given}) == wanted


def test_a_loaded_server_gives_every_answer_that_it_gives_alone(
    server: Running, objects: dict[str, AdaptedLlama], base_name: str
) -> None:
    """Forty streams of five models with eight settings, in eight slots."""
    cases = [
        (name, given, 4 + (3 * number) % 30)
        for number, (name, given) in enumerate((n, g) for g in [*SETTINGS, {}] for n in MODELS)
    ]
    wanted = [objects[name].generate("Say it back.", **sampling(given, n)) for name, given, n in cases]

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=server.v1, api_key="none", max_retries=0, timeout=250
        ) as asked:
            return await asyncio.gather(*(one(asked, *case) for case in cases))

    async def one(asked: openai.AsyncOpenAI, name: str, given: dict[str, Any], n: int) -> str:
        model = base_name if name == "base" else name
        more: dict[str, Any] = {"temperature": 0.0, **given}
        stream = await asked.chat.completions.create(
            model=model, messages=SAY, max_tokens=n, stream=True, **more
        )
        return "".join([part.choices[0].delta.content or "" async for part in stream])

    assert asyncio.run(main()) == wanted
    assert len(set(wanted)) > 20
    until(lambda: server.counter("lit_adapter_slots_used") == 0)


def test_streams_have_the_events_that_clients_expect(server: Running) -> None:
    body = {"model": "alpha", "messages": SAY, "max_tokens": 5, "temperature": 0, "stream": True}
    for more, n_extra in (({}, 0), ({"stream_options": {"include_usage": True}}, 1)):
        status, text, headers = server.ask("v1/chat/completions", body | more)
        assert status == 200
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = text.removesuffix("\n\n").split("\n\n")
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        assert {(c["id"], c["object"], c["model"]) for c in chunks} == {
            (chunks[0]["id"], "chat.completion.chunk", "alpha")
        }
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        last = chunks[len(chunks) - 1 - n_extra]
        assert last["choices"][0]["delta"] == {}
        assert last["choices"][0]["finish_reason"] in ("stop", "length")
        assert all("usage" in c for c in chunks) == bool(n_extra)
        if n_extra:
            assert chunks[-1]["choices"] == []
            usage = chunks[-1]["usage"]
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
            assert all(c["usage"] is None for c in chunks[:-1])


def test_n_answers_are_those_of_successive_seeds(client: openai.OpenAI) -> None:
    several = chat(client, n=3, temperature=1.5, seed=9)
    alone = [text_of(client, temperature=1.5, seed=9 + number) for number in range(3)]
    assert [choice.message.content for choice in several.choices] == alone
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len(set(alone)) == 3
    found = {0: "", 1: "", 2: ""}
    for part in chat(client, n=3, temperature=1.5, seed=9, stream=True):
        found[part.choices[0].index] += part.choices[0].delta.content or ""
    assert list(found.values()) == alone
    assert chat(client, temperature=1.5).choices[0].message.content != alone[0]  # a seed of its own


def test_stop_texts_end_an_answer_and_are_not_in_it(client: openai.OpenAI) -> None:
    whole = text_of(client, max_tokens=40)
    stop = whole[len(whole) // 2 :][:3]
    answer = chat(client, max_tokens=40, stop=[stop, "never said"], logprobs=True)
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    said = b"".join(bytes(token.bytes or []) for token in answer.choices[0].logprobs.content)
    assert whole.startswith(said.decode("utf-8", "replace").rstrip("\ufffd"))
    streamed = chat(client, max_tokens=40, stop=stop, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in streamed) == whole[: whole.index(stop)]
    assert chat(client, max_tokens=3).choices[0].finish_reason == "length"


def test_a_bias_forbids_and_forces_tokens(client: openai.OpenAI, objects: dict[str, AdaptedLlama]) -> None:
    tokenizer = objects["alpha"].tokenizer
    ids = objects["alpha"].template.encode_prompt(tokenizer, "Say it back.")
    first = int(objects["alpha"].logits(torch.tensor([ids]))[0, -1].argmax())
    answer = client.completions.create(
        model="alpha", prompt=ids, max_tokens=1, temperature=0, logit_bias={str(first): -100}, logprobs=0
    )
    assert answer.choices[0].logprobs.tokens != [tokenizer.decode([first])]
    forced = client.completions.create(
        model="alpha", prompt=ids, max_tokens=4, temperature=0, logit_bias={"40": 100}
    )
    assert forced.choices[0].text == tokenizer.decode([40] * 4)


def shown(piece: bytes) -> str:
    """A token as OpenAI shows it in completions."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def log_probabilities(model: AdaptedLlama, ids: list[int]) -> torch.Tensor:
    return model.logits(torch.tensor([ids]))[0].double().log_softmax(-1)


@pytest.mark.parametrize("name", ["alpha", "norms"])
def test_likelihoods_are_those_of_the_models_logits(
    client: openai.OpenAI, objects: dict[str, AdaptedLlama], name: str
) -> None:
    """Whatever temperature, penalties and biases choose."""
    prompt = [9, 30, 77, 12, 200]
    answer = client.completions.create(
        model=name,
        prompt=prompt,
        max_tokens=6,
        temperature=1.3,
        seed=2,
        echo=True,
        logprobs=3,
        presence_penalty=1.0,
    )
    (choice,) = answer.choices
    scores, tokenizer = choice.logprobs, objects[name].tokenizer
    assert scores.tokens[:5] == [tokenizer.decode([id_]) for id_ in prompt]
    assert choice.text.startswith(tokenizer.decode(prompt))
    for place, (token, offset) in enumerate(zip(scores.tokens, scores.text_offset, strict=True)):
        if not any(near.startswith("bytes:") for near in scores.tokens[max(0, place - 1) : place + 1]):
            assert choice.text[offset:].startswith(token)
    texts = {shown(tokenizer.piece(id_)): id_ for id_ in range(320)}
    ids = [texts[token] for token in scores.tokens]
    wanted = log_probabilities(objects[name], ids)
    assert scores.token_logprobs[0] is None
    assert scores.top_logprobs[0] is None
    for place in range(1, len(ids)):
        row = wanted[place - 1]
        assert scores.token_logprobs[place] == pytest.approx(float(row[ids[place]]), abs=1e-4)
        best = sorted(scores.top_logprobs[place].values(), reverse=True)[:3]
        assert best == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_a_chats_likelihoods_have_tokens_bytes_and_alternatives(
    client: openai.OpenAI, objects: dict[str, AdaptedLlama]
) -> None:
    whole = chat(client, logprobs=True, top_logprobs=2).choices[0]
    tokens = whole.logprobs.content
    assert (
        b"".join(bytes(token.bytes) for token in tokens).decode("utf-8", "replace") == whole.message.content
    )
    model = objects["alpha"]
    ids = model.template.encode_prompt(model.tokenizer, "Say it back.")
    row = log_probabilities(model, ids)[-1]
    assert tokens[0].logprob == pytest.approx(float(row.max()), abs=1e-4)
    assert [top.logprob for top in tokens[0].top_logprobs] == pytest.approx(
        row.topk(2).values.tolist(), abs=1e-4
    )
    streamed = [p.choices[0] for p in chat(client, logprobs=True, top_logprobs=2, stream=True) if p.choices]
    found = [token for choice in streamed if choice.logprobs for token in choice.logprobs.content]
    assert [token.token for token in found] == [token.token for token in tokens]


def test_prompts_of_completions_are_texts_lists_and_token_ids(
    client: openai.OpenAI, objects: dict[str, AdaptedLlama]
) -> None:
    tokenizer = objects["alpha"].tokenizer
    texts = ["red green", "a river and a stone"]
    # This base was trained with BOS.
    ids = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]

    def answers(prompt: Any, **more: Any) -> list[str]:
        given = {"model": "alpha", "prompt": prompt, "max_tokens": 6, "temperature": 0.0, **more}
        return [choice.text for choice in client.completions.create(**given).choices]

    wanted = []
    for prompt in ids:
        asked = Request(
            prompt, Sampling(max_new_tokens=6), objects["alpha"].adapter, objects["alpha"].stop_ids
        )
        wanted.append(tokenizer.decode(t for _, t in Engine().run([asked]) if t is not None))
    assert answers(texts[0]) == wanted[:1]
    assert answers(ids[0]) == wanted[:1]
    assert answers(texts) == answers(ids) == wanted
    assert answers(texts, echo=True) == [text + rest for text, rest in zip(texts, wanted, strict=True)]
    assert answers(texts, echo=True, max_tokens=0) == texts
    given = {"model": "alpha", "prompt": texts, "max_tokens": 6, "temperature": 0.0, "echo": True}
    found = ["", ""]
    for part in client.completions.create(stream=True, **given):
        found[part.choices[0].index] += part.choices[0].text
    assert found == [text + rest for text, rest in zip(texts, wanted, strict=True)]


def test_fields_that_change_nothing_are_taken_and_listed(server: Running) -> None:
    body = {"model": "alpha", "messages": SAY, "max_tokens": 1, "user": "me", "metadata": {"a": "b"}}
    body |= {"store": None, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}}
    status, _, headers = server.ask("v1/chat/completions", body)
    assert (status, headers["x-ignored-fields"]) == (200, "user, metadata")


REFUSED: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"model": "nope"}, 404, "'nope' does not exist", "model"),
    ({"model": "../alpha"}, 404, "does not exist", "model"),
    ({"temperature": 2.5}, 400, "temperature: ", "temperature"),
    ({"temperature": "1"}, 400, "temperature: ", "temperature"),
    ({"temperature": True}, 400, "temperature: ", "temperature"),
    ({"top_p": 0}, 400, "top_p: ", "top_p"),
    ({"top_k": -2}, 400, "top_k: ", "top_k"),
    ({"min_p": 1.5}, 400, "min_p: ", "min_p"),
    ({"presence_penalty": -3}, 400, "presence_penalty: ", "presence_penalty"),
    ({"frequency_penalty": 2.5}, 400, "frequency_penalty: ", "frequency_penalty"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty: ", "repetition_penalty"),
    ({"seed": 1.5}, 400, "seed: ", "seed"),
    ({"seed": 2**70}, 400, "seed: ", "seed"),
    ({"n": 0}, 400, "n: ", "n"),
    ({"n": 17}, 400, "n is 17; this server takes 16 or less", "n"),
    ({"max_tokens": 0}, 400, "max_tokens: ", "max_tokens"),
    ({"max_tokens": 5000}, 400, "max_tokens is 5000; this server takes 4096 or less", "max_tokens"),
    (
        {"max_tokens": 190},
        400,
        r"a prompt of \d+ tokens and max_tokens 190 exceed a context of 200",
        "max_tokens",
    ),
    ({"stop": ""}, 400, "a stop text has no or more than 256 characters", "stop"),
    ({"stop": ["x"] * 17}, 400, "17 stop texts; this server takes 16 or fewer", "stop"),
    ({"stop": [1]}, 400, "stop", None),
    ({"logprobs": False, "top_logprobs": 2}, 400, "top_logprobs is only for logprobs: true", None),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs: ", "top_logprobs"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias has the key 'x'; expected token ids from 0", "logit_bias"),
    ({"logit_bias": {"99999": 1}}, 400, "logit_bias has the key '99999'", "logit_bias"),
    ({"logit_bias": {"5": 101}}, 400, "logit_bias", None),
    ({"tools": [{"type": "function"}]}, 400, "'tools' is not offered by this server", "tools"),
    (
        {"response_format": {"type": "json_object"}},
        400,
        "'response_format' is not offered",
        "response_format",
    ),
    ({"reasoning_effort": "high"}, 400, "'reasoning_effort' is not offered", "reasoning_effort"),
    ({"temprature": 1}, 400, "unknown field 'temprature'; did you mean 'temperature'?", "temprature"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options is only for stream: true", None),
    ({"messages": []}, 400, "messages: ", "messages"),
    ({"messages": "hello"}, 400, "messages: ", "messages"),
    ({"messages": [{"role": "user"}]}, 400, r"'messages\[0\].content' is missing", "messages[0].content"),
    ({"messages": [{"role": "boss", "content": "x"}]}, 400, r"messages\[0\].role: ", "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages of role 'tool' are not off", None),
    (
        {"messages": [*SAY, {"role": "assistant", "content": "x"}]},
        400,
        "must be the user's",
        "messages[1].role",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "content of type 'image_url' is not offered; send text",
        "messages[0].content",
    ),
    ({"messages": SAY * 513}, 400, "513 messages; this server takes 512 or fewer", "messages"),
    ({"messages": [{"role": "user", "content": "word " * 400}]}, 400, "exceed a context of 200", "prompt"),
]


@pytest.mark.parametrize(("change", "status", "message", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_answered_is_refused_with_openais_error(
    server: Running, change: dict[str, Any], status: int, message: str, param: str | None
) -> None:
    import re

    body = {"model": "alpha", "messages": SAY, "max_tokens": 2, **change}
    found, answer, _ = server.ask("v1/chat/completions", body)
    assert found == status, answer
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert re.search(message, answer["error"]["message"]), answer
    assert answer["error"]["type"] == "invalid_request_error"
    if param is not None:
        assert answer["error"]["param"] == param


@pytest.mark.parametrize(
    ("prompt", "more", "message"),
    [
        ([], {}, "prompt: expected a text"),
        ([[]], {}, "prompt: expected a text"),
        ([1, "a"], {}, "prompt: expected a text"),
        ([5, 320], {}, "the prompt holds 320; token ids end at 319"),
        ([-1], {}, "prompt: expected a text"),
        (["x"] * 129, {}, "129 prompts with n 1 are 129 answers; this server takes 128 or fewer"),
        ("x", {"max_tokens": 0}, "max_tokens is 0; expected 1 or more, or echo: true"),
        ("x", {"logprobs": 21}, "logprobs: "),
        ("x", {"suffix": "y"}, "'suffix' is not offered"),
        ("x", {"best_of": 2}, "'best_of' is not offered"),
        ("a\ud800b", {}, "the text has half of a surrogate pair (U+D800) at character 1"),
    ],
)
def test_completions_that_cannot_be_given_are_refused(
    server: Running, prompt: Any, more: dict[str, Any], message: str
) -> None:
    status, answer, _ = server.ask("v1/completions", {"model": "alpha", "prompt": prompt, **more})
    assert status == 400, answer
    assert answer["error"]["message"].startswith(message)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[1]", 400),
        (b"null", 400),
        (b"\xff\xfe", 400),
        (b'{"model": NaN}', 400),
        (b'{"n": ' + b"9" * 5000 + b"}", 400),
        (b"[" * 100_000, 400),
        (b'{"model": "alpha", "messages": "' + b"x" * (2**21) + b'"}', 413),
    ],
    ids=["empty", "half", "array", "null", "no-utf8", "nan", "digits", "deep", "large"],
)
def test_bodies_that_are_no_request_are_refused(server: Running, content: bytes, status: int) -> None:
    for path in ("v1/chat/completions", "v1/completions"):
        found, answer, _ = server.ask(path, content)
        assert (found, set(answer)) == (status, {"error"}), answer


@pytest.mark.parametrize(
    "content", [b"[1]", b"null", b"\xff\xfe{", b"[" * 100_000], ids=["array", "null", "no-utf8", "deep"]
)
def test_a_body_that_is_no_object_is_told_what_is_expected(server: Running, content: bytes) -> None:
    _, answer, _ = server.ask("v1/completions", content)
    assert answer["error"]["code"] == "invalid_json"
    assert "JSON object" in answer["error"]["message"]


def test_other_addresses_methods_and_kinds_of_bodies(server: Running) -> None:
    assert server.ask("v1/nothing")[0] == 404
    assert server.ask("../../etc/passwd")[0] == 404
    assert server.ask("v1/models", {}, method="POST")[0] == 405
    assert server.ask("v1/models/..%2f..%2fetc%2fpasswd")[0] == 404
    status, answer, _ = server.ask("v1/completions", b"model=alpha", Content_Type="text/plain")
    assert (status, answer["error"]["code"]) == (415, "wrong_content_type")
    status, answer, _ = server.ask("v1/models", Host="elsewhere.example")
    assert (status, answer["error"]["code"]) == (403, "unknown_host")
    assert "access-control-allow-origin" not in server.ask("v1/models", Origin="https://x.example")[2]


def stream_begun(server: Running, **more: Any) -> socket.socket:
    """A connection on which a long answer has begun to come."""
    body = {"model": "alpha", "messages": SAY, "max_tokens": 80, "stream": True, "temperature": 1.0, **more}
    body |= {"logit_bias": {str(id_): -100 for id_ in (0, 1)}}  # it does not end by itself
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=300)
    connection.sendall(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
    seen = b""
    while b'"content":"' not in seen.replace(b'"content":""', b""):
        received = connection.recv(4096)
        assert received, seen
        seen += received
    return connection


def until(what: Any, seconds: float = 250) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_client_that_goes_frees_its_slot_within_a_step(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without a stream. Steps are slow here, so that the answer would take eight seconds."""
    from lit_adapter.model.cpu_decode import CpuDecode

    plain = CpuDecode.step

    def slow(self: Any, *given: Any) -> Any:
        time.sleep(0.1)
        return plain(self, *given)

    monkeypatch.setattr(CpuDecode, "step", slow)
    for n in (1, 3):
        connection = stream_begun(server, n=n)
        assert server.counter("lit_adapter_slots_used") == n
        before = server.counter("lit_adapter_tokens_total")
        connection.close()
        until(lambda: server.counter("lit_adapter_slots_used") == 0)
        assert server.counter("lit_adapter_tokens_total") - before <= 8 * n
    with pytest.raises(TimeoutError):
        server_timeout(server)
    until(lambda: server.counter("lit_adapter_slots_used") == 0)


def server_timeout(server: Running) -> None:
    """Ask for a whole answer, and go before it is there."""
    content = json.dumps(
        {"model": "alpha", "messages": SAY, "max_tokens": 80, "logit_bias": {"0": -100, "1": -100}}
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.5) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
        connection.recv(1)


def test_health_metrics_and_the_log(server: Running, client: openai.OpenAI) -> None:
    assert server.ask("health")[:2] == (200, {"live": True, "ready": True})
    assert server.ask("health/live")[:2] == (200, {"live": True})
    before = server.counter("lit_adapter_tokens_total")
    secret = "a very private question"
    answer = chat(client, messages=[{"role": "user", "content": secret}], max_tokens=7)
    assert server.counter("lit_adapter_tokens_total") - before == answer.usage.completion_tokens
    for name in ("queue_length", "slots", "first_token_seconds_count", "between_tokens_seconds_count"):
        assert server.counter(f"lit_adapter_{name}") >= 0
    lines = [json.loads(line) for line in server.log.getvalue().splitlines() if line.startswith("{")]
    (mine,) = [line for line in lines if line.get("completion_tokens") and line["model"] == "alpha"][-1:]
    assert mine["prompt_tokens"] == answer.usage.prompt_tokens
    assert (mine["status"], mine["path"]) == (200, "/v1/chat/completions")
    assert secret not in server.log.getvalue()


def test_an_error_in_the_model_ends_one_answer_alone(
    tiny_base: Path, paths: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(paths["alpha"], "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    gate = next(name for name in tensors if name.endswith("gate"))
    tensors[gate] = torch.full_like(tensors[gate], 3e38)
    prompt = gate.replace("gate", "prompt")
    tensors[prompt] = torch.full_like(tensors[prompt], 1e37)
    broken = tmp_path / "broken.safetensors"
    save_file(tensors, broken, metadata)
    with running(base=tiny_base, adapters={"alpha": paths["alpha"], "broken": broken}) as server:
        body = {"model": "broken", "messages": SAY, "max_tokens": 4, "temperature": 0}
        status, answer, _ = server.ask("v1/chat/completions", body)
        assert (status, answer["error"]["type"]) == (500, "server_error")
        assert "NaN or infinite" in answer["error"]["message"]
        status, text, _ = server.ask("v1/chat/completions", body | {"stream": True})
        assert status == 200
        assert "NaN or infinite" in text.strip().splitlines()[-1]
        assert "[DONE]" not in text
        assert server.ask("v1/chat/completions", body | {"model": "alpha"})[0] == 200


def test_threads_of_clients_are_all_served(server: Running, client: openai.OpenAI) -> None:
    """Twenty at once in eight slots."""
    answered: list[int] = []

    def one() -> None:
        answered.append(len(chat(client, max_tokens=20, logprobs=False).choices))

    threads = [threading.Thread(target=one) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answered == [1] * 20


def test_the_warm_up_covers_adapters_of_every_form(tiny_base: Path, tmp_path: Path) -> None:
    """Also where there are more adapters than slots, and the odd ones come last."""
    plain = AdapterConfig(prompt_length=3, norms=False)
    forms = [plain, plain, plain, replace(plain, prompt_length=6, gate="token"), replace(plain, norms=True)]
    paths = {
        f"a{n}": save_random_adapter(tiny_base, tmp_path / f"{n}.safetensors", n, form)
        for n, form in enumerate(forms)
    }
    adapters = load_adapters(ServerOptions(base=tiny_base, adapters=paths, device="cpu", dtype="float32"))
    base = adapters.base.model
    base.engine.reserve(base.model, 2, 200)
    _warm_up(adapters, 2, 128)
    (lane,) = base.engine._lanes.values()
    prefixes = lane.executor.prefixes
    assert prefixes.norms is not None
    assert prefixes.joined.length == 6


def test_the_warm_up_packs_the_matrices(tiny_base: Path) -> None:
    if not packs(torch.float32):
        pytest.skip("oneDNN packs no weights on this processor")
    adapters = load_adapters(ServerOptions(base=tiny_base, adapters={}, device="cpu", dtype="float32"))
    base = adapters.base.model
    base.engine.reserve(base.model, 4, 200)
    _warm_up(adapters, 4, 128)
    assert base.model.decode_weights.head.packed is not None
