"""lm-evaluation-harness with our model and with its own ``hf`` model on the same weights: the same scores."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from generation_fixtures import save_random_adapter
from local_tasks import KINDS, write_tasks
from tokenizers.processors import TemplateProcessing

import lit_adapter
from lit_adapter.errors import UserError
from lit_adapter.evaluation import evaluate as evaluation
from lit_adapter.evaluation.conversation import ChatTemplate
from lit_adapter.evaluation.settings import Evaluation
from lit_adapter.evaluation.tables import number
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.lora_config import LoraConfig
from lit_adapter.weights.convert import convert
from lit_adapter.weights.foreign.convert import ConversionOptions, convert_adapter

CHAT = (
    "{% for message in messages %}{{ '<s>' + message['role'] + ': ' + message['content'] | trim + '</s>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def source(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a Hugging Face folder whose tokenizer adds BOS, and has a chat template."""
    folder = tmp_path_factory.mktemp("harness") / "source"
    shutil.copytree(tiny_base.parent / "source", folder)
    path = str(folder / "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(path)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(path)
    about = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"chat_template": CHAT}))
    return folder


@pytest.fixture(scope="module")
def base(source: Path) -> Path:
    return convert(source, source.parent / "base")


def responses(model: Any, paths: list[Path], **more: Any) -> Any:
    """What the harness got for every document, and the scores."""
    os.environ["TQDM_DISABLE"] = "1"
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model,
        tasks=[str(path) for path in paths],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
        **more,
    )
    return {
        task: [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for task, samples in found["samples"].items()
    }, {
        task: {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
        for task, values in found["results"].items()
    }


def check_same(ours: Any, theirs: Any, paths: list[Path], **more: Any) -> None:
    """Every response, not only the scores: likelihoods to rounding, answers and flags exactly."""
    (mine, my_scores), (other, other_scores) = (responses(model, paths, **more) for model in (ours, theirs))
    assert set(mine) == set(KINDS)
    for task in mine:
        for a, b in zip(mine[task], other[task], strict=True):
            if isinstance(a[0], str):
                assert a == b
            elif isinstance(a[0], tuple):
                assert [flag for _, flag in a] == [flag for _, flag in b]
                assert [value for value, _ in a] == pytest.approx([value for value, _ in b], abs=2e-3)
            else:
                assert a == pytest.approx(b, rel=1e-5)
        assert my_scores[task] == pytest.approx(other_scores[task], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
def test_the_base_has_the_scores_of_hf(base: Path, source: Path, tmp_path: Path, chat: bool) -> None:
    from lm_eval.models.huggingface import HFLM

    from lit_adapter.evaluation.harness import HarnessModel

    model = lit_adapter.load(base=base, device="cpu", dtype="float32")
    theirs = HFLM(str(source), device="cpu", dtype="float32", batch_size=3)
    more: dict[str, Any] = {"apply_chat_template": True, "system_instruction": "Be brief."} if chat else {}
    check_same(HarnessModel(model), theirs, list(write_tasks(tmp_path).values()), **more)


@pytest.mark.slow
def test_an_adapter_has_the_scores_of_its_peft_export(base: Path, source: Path, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    from lit_adapter.evaluation.harness import HarnessModel

    config = AdapterConfig(prompt_length=0, lora=LoraConfig(rank=2, on=("q_proj", "down_proj")))
    adapter = save_random_adapter(base, tmp_path / "lora" / "adapter.safetensors", config=config)
    convert_adapter(adapter, tmp_path / "peft", ConversionOptions(to="peft-lora", base=base))
    model = lit_adapter.load(adapter, base, device="cpu", dtype="float32")
    theirs = HFLM(str(source), peft=str(tmp_path / "peft"), device="cpu", dtype="float32", batch_size=3)
    check_same(HarnessModel(model), theirs, list(write_tasks(tmp_path).values()))


def test_tasks_and_their_data_are_found_and_compared(base: Path, tmp_path: Path) -> None:
    paths = write_tasks(tmp_path, data="docs.jsonl")  # beside the tasks, not in the working directory
    adapter = save_random_adapter(base, tmp_path / "run" / "adapter.safetensors")
    settings = Evaluation(
        out=tmp_path / "out",
        adapters=(adapter,),
        base=base,
        tasks=(str(paths["word"]), str(paths["answer"])),
        limit=4,
        device="cpu",
        dtype="float32",
    )
    found = evaluation.evaluate(settings, lambda line: None)["tasks"]
    assert set(found) == {"word", "answer"}
    assert found["word"]["perplexity"]["base"]["value"] != found["word"]["perplexity"]["run"]["value"]
    assert "word, perplexity" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    first = (tmp_path / "out" / "report.md").read_text(encoding="utf-8").split("## ")[0]
    base, run = (number(found["word"]["perplexity"][name]["value"]) for name in ("base", "run"))
    assert re.search(f"^Word, perplexity: base {base} ± [^,]+, run {run} ± .*[.]$", first, re.MULTILINE)


def test_finished_tasks_are_not_computed_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a stop in the second task, only what is missing; and nothing of other data is taken over."""
    import lm_eval

    paths = write_tasks(tmp_path)
    names, asked = (str(paths["word"]), str(paths["answer"])), []
    settings = Evaluation(
        out=tmp_path / "out", base=base, tasks=names, limit=4, device="cpu", dtype="float32"
    )
    simple_evaluate = lm_eval.simple_evaluate

    def stopped(model: Any, *, tasks: list[Any], **more: Any) -> Any:
        asked.append(tasks[0].config.task)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return simple_evaluate(model, tasks=tasks, **more)

    monkeypatch.setattr(lm_eval, "simple_evaluate", stopped)
    with pytest.raises(KeyboardInterrupt, match="what is finished is kept; the same command continues"):
        evaluation.evaluate(settings, lambda line: None)
    found = evaluation.evaluate(settings, lambda line: None)["tasks"]
    assert asked == ["word", "answer", "answer"]
    fresh = replace(settings, out=tmp_path / "fresh")
    assert evaluation.evaluate(fresh, lambda line: None)["tasks"] == found
    with pytest.raises(UserError, match=r"tasks\.jsonl: answers of another run \(other limit\); choose"):
        evaluation.evaluate(replace(settings, limit=3), lambda line: None)
    data = tmp_path / "docs.jsonl"
    data.write_text(data.read_text().replace("red", "blue"))
    with pytest.raises(UserError, match=r"other data of tasks"):
        evaluation.evaluate(settings, lambda line: None)


def test_a_conversation_is_rendered_once_for_its_roles(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    from lit_adapter.text import chat
    from lit_adapter.text.load import load_tokenizer

    asked: list[Any] = []
    ask = chat.ask
    monkeypatch.setattr(chat, "ask", lambda *given: asked.append(given) or ask(*given))
    template = ChatTemplate(load_tokenizer(base))
    theirs = AutoTokenizer.from_pretrained(base)
    roles = ("system", "user", "assistant", "user")
    for words in (["a", " b\n", "{{ c }}", "<s>"], ["x", "", "y ", "z"]):
        messages = [{"role": role, "content": text} for role, text in zip(roles, words, strict=True)]
        wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert template.render(messages, asks=True) == wanted
    assert len(asked) == 1


def test_a_base_without_a_chat_template_says_so(tiny_base: Path) -> None:
    from lit_adapter.text.load import load_tokenizer

    with pytest.raises(UserError, match="no chat template; leave --chat_template out"):
        ChatTemplate(load_tokenizer(tiny_base))


def test_libraries_stay_quiet_that_are_first_imported_with_the_tasks() -> None:
    """Without a network, the Hub's client would log each of its retries."""
    code = (
        "import logging\n"
        "from lit_adapter.evaluation.tasks import NOISY, _quiet\n"
        "with _quiet():\n"
        "    import lm_eval.tasks\n"
        "    print([logging.getLogger(name).getEffectiveLevel() for name in NOISY])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{[40] * 4}\n"
