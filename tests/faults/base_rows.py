"""Faults 94 to 99: a converted base of which a file is no longer the one that was converted.

Each is tried by an answer and by a resumed run, after the base has passed unchanged. Sizes and times of the
files stay as they were wherever the fault allows it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import Bench, Outcome, Row
from generation_fixtures import save_random_adapter
from model_rows import overwrite
from safetensors.torch import load_file

from lit_adapter.weights.base_content import check_content

WEIGHTS, LAYER = "model.safetensors", "model.layers.2."
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
NEW_BASE = r"or, if you meant to change it, make a new base: scripts/convert\.py \S+other --out ANOTHER$"
Change = Callable[[Path], object]


def zeroed(folder: Path) -> None:
    """The seven matrices of one layer, as a copy that was interrupted leaves them."""
    state = load_file(folder / WEIGHTS)
    matrices = [name for name, value in state.items() if name.startswith(LAYER) and value.ndim == 2]
    assert len(matrices) == 7
    overwrite(folder / WEIGHTS, **{name.replace(".", "__"): state[name] * 0 for name in matrices})


def swapped(folder: Path) -> None:
    """Two ids of the vocabulary change places."""
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    (a,), (b,) = (re.findall(rf'"{token}": ?(\d+)', text) for token in "ab")
    assert len(a) == len(b)
    for token, id_ in (("a", b), ("b", a)):
        text = re.sub(rf'("{token}": ?)\d+', rf"\g<1>{id_}", text)
    path.write_text(text, encoding="utf-8")


def replace_in(name: str, old: str, new: str) -> Change:
    def change(folder: Path) -> None:
        text = (folder / name).read_text(encoding="utf-8")
        assert text.count(old) == 1
        (folder / name).write_text(text.replace(old, new), encoding="utf-8")

    return change


def added(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def changed_quietly(folder: Path, change: Change) -> None:
    """Change a base that has passed; its files keep their times of modification."""
    check_content(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    change(folder)
    for path, time in times.items():
        os.utime(path, ns=(time, time))


def plain(bench: Bench) -> Path:
    """The base of the bench's finished run."""
    bench.copy_finished_run()
    return bench.copy_base("other")


def of_format_1(bench: Bench) -> Path:
    """The same as an earlier version converted it."""
    folder = plain(bench)
    path = folder / "fingerprint.json"
    later = json.loads(path.read_text())
    older = {key: later[key] for key in ("weights", "tokenizer", "files", "source")}
    path.write_text(json.dumps({"format": 1} | older))
    return folder


def with_template(bench: Bench) -> Path:
    """A base with a chat template, and a run on it."""
    folder = bench.new_base(lambda source: (source / "chat_template.jinja").write_text(TEMPLATE))
    assert bench.finetune("--optim.max_steps", 1, "--trainer.samples", 0, base=folder).status == 0
    return folder


def rows(
    fault: int, what: str, change: Change, message: str, base: Callable[[Bench], Path] = plain
) -> Iterator[Row]:
    """One row for an answer and one for a resumed run."""

    def answered(bench: Bench) -> Outcome:
        folder = base(bench)
        adapter = save_random_adapter(folder, bench.folder / "own.safetensors")
        changed_quietly(folder, change)
        return bench.generate("--base", folder, "--adapter", adapter)

    def resumed(bench: Bench) -> Outcome:
        folder = base(bench)
        changed_quietly(folder, change)
        return bench.finetune("--optim.max_steps", 9, "--resume", "last", base=folder)

    yield Row(fault, what, answered, message)
    yield Row(fault, f"{what} on resume", resumed, message)


CHANGED = r" has changed since the base was converted; restore the file, "
ROWS = [
    *rows(94, "layer zeroed", zeroed, rf"{WEIGHTS}: tensor {LAYER}\S+ \(and 6 more\){CHANGED}or convert"),
    *rows(95, "ids swapped", swapped, rf"tokenizer\.json:{CHANGED}{NEW_BASE}"),
    *rows(
        96,
        "other eos",
        replace_in("config.json", '"eos_token_id": 1', '"eos_token_id": 5'),
        rf"other/config\.json:{CHANGED}{NEW_BASE}",
    ),
    *rows(
        96,
        "other stop ids",
        replace_in("generation_config.json", '"eos_token_id": 1', '"eos_token_id": 5'),
        rf"generation_config\.json:{CHANGED}{NEW_BASE}",
    ),
    *rows(
        97,
        "template edited",
        replace_in("chat_template.jinja", "{{ m.content }}", "{{ m.kontent }}"),
        rf"chat_template\.jinja:{CHANGED}{NEW_BASE}",
        with_template,
    ),
    *rows(
        98,
        "file added",
        added("added_tokens.json", '{"<new>": 7}'),
        r"added_tokens\.json: was added after the base was converted; remove it, or make a new base",
    ),
    *rows(
        98,
        "shard added",
        added("model-00002.safetensors", "x"),
        r"model-00002\.safetensors: was added after the base was converted; remove it, or make a new base",
    ),
    *rows(
        99,
        "format 1, layer zeroed",
        zeroed,
        rf"{WEIGHTS}: tensor {LAYER}\S+ .*{CHANGED}or convert",
        of_format_1,
    ),
    *rows(99, "format 1, ids swapped", swapped, rf"tokenizer\.json:?.*{CHANGED}{NEW_BASE}", of_format_1),
    *rows(
        99,
        "format 1, other eos",
        replace_in("config.json", '"eos_token_id": 1', '"eos_token_id": 5'),
        rf"other/config\.json:{CHANGED}{NEW_BASE}",
        of_format_1,
    ),
]
