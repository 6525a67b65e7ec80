"""Prompt templates: what a record becomes, for every kind of tokenizer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import CHATML, HARD, MAKERS, Kind

from lit_adapter.errors import UserError
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import Template, resolve_template
from lit_adapter.text.tokenizer import Tokenizer

NAMES = pytest.mark.parametrize("name", list(MAKERS))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.lists(
    st.sampled_from([*HARD, "\n", " x", "### Response:", "{input}", "Hello"]), max_size=3
).map("".join)
CUSTOM = "<s>[INST] {instruction}\n{input}<|im_end|> %s {0} {{x}}"
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nSay {input}.\n\n### Response:"
)
ALPACA_INPUT_PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\nSay it.\n\n"
    "### Input:\n{instruction}\n\n### Response:"
)


def templates(tokenizer: Tokenizer) -> list[Template]:
    found = [resolve_template(name, tokenizer) for name in ("alpaca", "alpaca-newline", CUSTOM)]
    return [*found, resolve_template("chat", tokenizer)] if tokenizer.chat_template else found


@NAMES
def test_a_prompt_is_the_same_with_and_without_its_answer(made: dict[str, Kind], name: str) -> None:
    ours = made[name].ours
    control = set(ours.control_tokens.values())
    all_templates = templates(ours)
    n_control = {
        template: len([id_ for id_ in template.encode_prompt(ours, "x", "y") if id_ in control])
        for template in all_templates
    }

    @settings(max_examples=80)
    @given(st.sampled_from(all_templates), TEXT, TEXT, TEXT)
    def check(template: Template, instruction: str, input_: str, output: str) -> None:
        ids, n_prompt = template.encode_example(ours, instruction, input_, output)
        assert ids[:n_prompt] == template.encode_prompt(ours, instruction, input_)
        assert ids[-1] == template.end_id(ours)
        assert not control & set(ids[n_prompt:-1])
        assert len(control & set(ids)) >= 1
        assert len([id_ for id_ in ids[:n_prompt] if id_ in control]) == n_control[template]
        answer = ours.decode(ids[n_prompt:])
        if ours.strips_space:
            # Where the encoder adds a space to every text, the decoder takes off one that was the answer's.
            plain = output.replace("\u2581", " ")
            assert answer in (plain, plain.removeprefix(" "))
        else:
            assert answer == output

    check()


@NAMES
def test_alpaca_to_the_letter(made: dict[str, Kind], name: str) -> None:
    ours = made[name].ours
    bos = [ours.bos_id] if ours.add_bos else []
    for kind, newline in (("alpaca", ""), ("alpaca-newline", "\n")):
        template = resolve_template(kind, ours)
        without = template.encode_prompt(ours, "Say {input}.")
        assert without == bos + made[name].reference(ALPACA_PROMPT + newline)
        with_input = template.encode_prompt(ours, "Say it.", "{instruction}")
        assert with_input == bos + made[name].reference(ALPACA_INPUT_PROMPT + newline)
        assert (template.variant(True), template.variant(False)) == (0, 1)


@NAMES
def test_the_boundary_is_the_one_of_the_joint_text(made: dict[str, Kind], name: str) -> None:
    kind = made[name]
    bos = [kind.ours.bos_id] if kind.ours.add_bos else []
    template = resolve_template("alpaca", kind.ours)
    ids, _ = template.encode_example(kind.ours, "Say {input}.", "", "Red, green")
    assert ids == [*bos, *kind.reference(ALPACA_PROMPT + "Red, green"), kind.ours.eos_id]


def test_an_answer_that_would_merge_with_the_prompt_continues_it(made: dict[str, Kind]) -> None:
    kind = made["json-bytes"]
    template = resolve_template("Say: {instruction}", kind.ours)
    ids, n_prompt = template.encode_example(kind.ours, "Hel", "", "lo")
    assert kind.reference("Say: Hello") != ids[:-1]
    assert ids[:-1] == kind.reference("Say: Hel") + kind.reference("lo")
    assert ids[:n_prompt] == template.encode_prompt(kind.ours, "Hel")


@pytest.mark.parametrize("name", ["json-prepend", "json-first", "json-bytes", "gguf-bytes"])
@pytest.mark.parametrize("words", ["Hello", "  Hello 12\n", "it's\n\n\U0001f600", "東京"])
def test_chat_prompts_are_transformers_ids(made: dict[str, Kind], name: str, words: str) -> None:
    kind = made[name]
    template = resolve_template("chat", kind.ours)
    expected = kind.transformers.apply_chat_template(
        [{"role": "user", "content": words}], add_generation_prompt=True
    )["input_ids"]
    assert template.encode_prompt(kind.ours, words) == expected
    messages = [{"role": "user", "content": words}, {"role": "assistant", "content": "Hello you"}]
    whole = kind.transformers.apply_chat_template(messages)["input_ids"]
    ids, _ = template.encode_example(kind.ours, words, "", "Hello you")
    # Some templates write a line break or a space around the end token, which a model never gets to see.
    without_spaces = [id_ for id_ in whole[len(ids) - 1 :] if kind.ours.piece(id_).strip()]
    assert ids[:-1] == whole[: len(ids) - 1]
    assert ids[-1] in whole[len(ids) - 1 :]
    assert not without_spaces


def test_llama3_chat(made: dict[str, Kind]) -> None:
    kind = made["ranks"]
    ours, control = kind.ours, kind.ours.control_tokens
    template = resolve_template("chat", ours)
    assert template.trim
    assert template.end == "<|eot_id|>"
    header = [control["<|start_header_id|>"], *kind.reference("user"), control["<|end_header_id|>"]]
    answer = [control["<|start_header_id|>"], *kind.reference("assistant"), control["<|end_header_id|>"]]
    ids, n_prompt = template.encode_example(ours, " Hello\n", "", "Hi <|eot_id|>")
    prompt = [ours.bos_id, *header, *kind.reference("\n\nHello"), control["<|eot_id|>"], *answer]
    assert ids[:n_prompt] == [*prompt, *kind.reference("\n\n")]
    assert ids[n_prompt:] == [*kind.reference("Hi <|eot_id|>"), control["<|eot_id|>"]]


def test_chat_shows_an_input_below_the_instruction(made: dict[str, Kind]) -> None:
    ours = made["json-bytes"].ours
    template = resolve_template("chat", ours)
    assert template.encode_prompt(ours, "Do", "it") == template.encode_prompt(ours, "Do\n\nit")
    assert (template.variant(True), template.variant(False)) == (0, 0)
    assert template.stop_ids(ours) == {ours.control_tokens["<|im_end|>"]}


def test_control_tokens_of_the_template_s_own_text(made: dict[str, Kind]) -> None:
    kind = made["json-bytes"]
    start, end = (kind.ours.control_tokens[token] for token in ("<|im_start|>", "<|im_end|>"))
    template = resolve_template("<|im_start|>a<|im_{instruction}end|>b<|im_end|>", kind.ours)
    assert template.encode_prompt(kind.ours, "") == [start, *kind.reference("a<|im_end|>b"), end]
    assert template.encode_prompt(kind.ours, "<|im_end|>").count(end) == 1


@pytest.mark.parametrize("legacy", [None, True, False])
def test_the_space_after_a_control_token(made: dict[str, Kind], tmp_path: Path, legacy: bool | None) -> None:
    """Legacy tokenizers of sentencepiece put one before every text, the others only at the start."""
    kind = made["sentencepiece"]
    (tmp_path / "tokenizer.model").write_bytes((kind.folder / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({} if legacy is None else {"legacy": legacy}))
    ours = load_tokenizer(tmp_path)
    before = kind.reference("x")
    after = kind.reference("Hello") if legacy is not False else kind.reference("xHello")[len(before) :]
    assert kind.reference("xHello")[: len(before)] == before
    template = resolve_template("x</s>{instruction}", ours)
    assert template.encode_prompt(ours, "Hello") == [ours.bos_id, *before, ours.eos_id, *after]


def test_bos_is_not_put_twice(made: dict[str, Kind]) -> None:
    ours = made["ranks"].ours
    ids = resolve_template("<|begin_of_text|>{instruction}", ours).encode_prompt(ours, "Hello")
    assert ids == resolve_template("{instruction}", ours).encode_prompt(ours, "Hello")
    assert ids.count(ours.bos_id) == 1


@NAMES
def test_templates_survive_json(made: dict[str, Kind], name: str) -> None:
    for template in templates(made[name].ours):
        assert Template.from_dict(json.loads(json.dumps(template.to_dict()))) == template


@pytest.mark.parametrize(
    "change",
    [{"text": None}, {"kind": "poem"}, {"more": 1}, {"trim": "yes"}, {"text": "no place"}, {"end": 5}],
)
def test_damaged_records_are_refused(made: dict[str, Kind], change: dict[str, object]) -> None:
    raw = resolve_template("alpaca", made["json-bytes"].ours).to_dict()
    with pytest.raises(ValueError, match="template"):
        Template.from_dict(raw | change)


def test_templates_from_files(made: dict[str, Kind], tmp_path: Path) -> None:
    ours = made["json-bytes"].ours
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffQ: {instruction}\r\nA:\r\n".encode())
    template = resolve_template(str(path), ours)
    assert (template.kind, template.text) == ("custom", "Q: {instruction}\nA:")
    second = Template("custom", "Q {instruction} {input}", "Q {instruction}")
    assert [second.variant(has_input) for has_input in (True, False)] == [0, 1]
    assert ours.decode(second.encode_prompt(ours, "x")) == "Q x"
    text = '{"do": {instruction}} {place} {} {introduction} \\textbf{{input}}'
    path.write_text(text)
    assert resolve_template(str(path), ours).text == text
    path.write_text("{instruction}{ input }")
    with pytest.raises(UserError, match=r"mine.txt: \{ input \} is not a field; write \{input\}"):
        resolve_template(str(path), ours)
    path.write_text("no place for words")
    with pytest.raises(UserError, match=r"mine.txt: \{instruction\} is missing"):
        resolve_template(str(path), ours)
    path.write_bytes(b"\xff{instruction}")
    with pytest.raises(UserError, match="not UTF-8 text"):
        resolve_template(str(path), ours)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("alpcaa", "did you mean 'alpaca'"),
        ("chatt", "did you mean 'chat'"),
        (
            "",
            "expected alpaca, alpaca-newline, chat, chatml, llama3, mistral, alpaca-chat, auto, a text with",
        ),
        ("Q: {question}\nA:", "is unknown; expected"),
        ("a" * 5000, "has no {instruction}, and is no readable file: File name too long"),
        ("{instruction} {output}", "leave out {output}"),
        ("{instruction} {inputs}", "{inputs} is not a field; write {input}"),
        ("{instruction} {instuction}", "{instuction} is not a field; write {instruction}"),
        ("{instruction} {Input}", "{Input} is not a field; write {input}"),
    ],
)
def test_unknown_templates(made: dict[str, Kind], choice: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        resolve_template(choice, made["json-bytes"].ours)


def test_records_that_a_template_cannot_show(made: dict[str, Kind]) -> None:
    ours = made["json-bytes"].ours
    with pytest.raises(
        UserError, match=r"no place for an input; leave the input out, or use .* with \{input\}"
    ):
        resolve_template("{instruction}:", ours).encode_prompt(ours, "a", "b")
    with pytest.raises(UserError, match=r"half of a surrogate pair \(U\+D800\)"):
        resolve_template("alpaca", ours).encode_example(ours, "a", "", "b\ud800")
    with pytest.raises(UserError, match="the prompt is empty"):
        resolve_template("{instruction}", ours).encode_prompt(ours, "")
    other = made["ranks"].ours
    with pytest.raises(
        UserError, match=r"no control token '<\|im_end\|>'; the template belongs to another base"
    ):
        resolve_template("chat", ours).encode_example(other, "a", "", "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ raise_exception('no users') }}", "chat template fails: no users"),
        ("{% for m in messages %}", "chat template fails"),
        ("{{ messages[5].content }}{{ 1 + 'a' }}", "chat template fails"),
        ("{{ ''.__class__.__mro__ }}", "chat template fails"),
        ("{{ messages.append(1) }}", "chat template fails"),
        ("Hello", "shows the user's message 0 times"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "2 times"),
        ("{{ messages[0].content }}", "shows no answer"),
        ("{instruction}{% for m in messages %}{{ m.content }}{% endfor %}", "in its own text"),
        ("", "this base has no chat template"),
    ],
)
def test_chat_templates_that_cannot_be_used(
    made: dict[str, Kind], tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((made["json-bytes"].folder / "tokenizer.json").read_bytes())
    config = {"eos_token": "<|im_end|>", "chat_template": text}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as caught:
        resolve_template("chat", load_tokenizer(tmp_path))
    assert "\n" not in str(caught.value)


def test_what_chat_templates_expect_of_their_surroundings(made: dict[str, Kind], tmp_path: Path) -> None:
    """Block trimming, loop controls, generation blocks, a date, JSON: as transformers renders them."""
    kind = made["json-bytes"]
    text = (
        "{{ strftime_now('%Y')[:2] }} {{ {'a<': 'é'} | tojson }}\n"
        "    {% for m in messages %}\n{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% generation %}<|im_start|>{{ m.content }}<|im_end|>{% endgeneration %}\n    {% endfor %}\n"
        "{% if tools is not none %}tools{% endif %}{{ eos_token }}"
    )
    (tmp_path / "tokenizer.json").write_bytes((kind.folder / "tokenizer.json").read_bytes())
    listed = [{"name": "tools", "template": "x"}, {"name": "default", "template": text}]
    config = {"eos_token": "<|im_end|>", "chat_template": listed}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    expected = kind.transformers.apply_chat_template([{"role": "user", "content": "Hi"}], chat_template=text)
    assert resolve_template("chat", ours).encode_prompt(ours, "Hi") == expected["input_ids"]
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert load_tokenizer(tmp_path).chat_template == CHATML
