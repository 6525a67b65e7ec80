"""Imports go only downward, configurations parse, and nothing unsafe is called."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from paper import paper

from lit_adapter.cli.finetune import parse_finetune

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "lit_adapter").rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
BENCHMARKS = sorted((ROOT / "scripts").glob("*/*.py"))
LAYERS = [
    ("errors",),
    ("arguments", "streams", "progress", "grouping"),
    ("files", "device", "hub", "spinning"),
    ("model",),
    ("text", "config"),
    ("weights", "data"),
    ("generation",),
    ("evaluation",),
    ("comparison",),
    ("serving", "training"),
    ("quickstart",),
    ("cli",),
    ("__main__",),
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
MAY_IMPORT_LIGHTNING = ("lit_adapter.data.module", "lit_adapter.training.")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that an import names, ``from a import b`` as a.b too: b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top_level(tree: ast.Module) -> ast.Module:
    """What is imported with the module itself: not in functions, not under TYPE_CHECKING."""
    return ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def test_every_part_has_its_layer() -> None:
    parts = {name.split(".")[1] for name in TREES if "." in name}
    assert parts == set(LEVEL)


@pytest.mark.parametrize("name", [name for name in TREES if "." in name])
def test_imports_go_only_downward(name: str) -> None:
    part = name.split(".")[1]
    for other in imported(TREES[name]):
        if not other.startswith("lit_adapter.") or other.split(".")[1] not in LEVEL:
            continue
        below = other.split(".")[1]
        allowed = below == part or LEVEL[below] < LEVEL[part]
        assert allowed, f"{name} imports {other}, which is not below it"


def test_modules_import_each_other_without_cycles() -> None:
    graph = {
        name: {other for other in imported(top_level(tree)) if other in TREES and other != name}
        for name, tree in TREES.items()
    }
    TopologicalSorter(graph).prepare()


def test_only_training_knows_lightning() -> None:
    for name, tree in TREES.items():
        if any(re.match(r"(pytorch_)?lightning\b", other) for other in imported(tree)):
            assert name.startswith(MAY_IMPORT_LIGHTNING), name


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        (
            ", ".join(module_name(path) for path in SOURCES if path.parent.name == "cli"),
            {"torch", "lightning", "transformers"},
        ),
        ("lit_adapter.text.load", {"torch", "lightning", "transformers"}),
        ("lit_adapter.data.encode", {"torch", "lightning", "sentencepiece", "tokenizers"}),
        (
            "lit_adapter.data.packing, lit_adapter.weights.convert, lit_adapter.generation.engine",
            {"lightning", "transformers", "peft"},
        ),
    ],
)
def test_what_starts_light_stays_light(modules: str, heavy: set[str]) -> None:
    """Processes that encode import `data.encode`, --help the command lines, and prompting the engine."""
    code = f"import sys, {modules}; print(*{heavy!r} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


HEAVY = {"fastapi", "torch", "lightning", "transformers", "peft", "numpy", "gguf", "huggingface_hub"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help_is_shown_without_anything_heavy(path: Path) -> None:
    """A second is enough for it then."""
    code = (
        "import contextlib, runpy, sys; sys.argv = sys.argv[1:] + ['--help']\n"
        f"with contextlib.suppress(SystemExit): runpy.run_path({str(path)!r}, run_name='__main__')\n"
        f"print('heavy:', *{HEAVY!r} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", code, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(path.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    assert "usage:" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["heavy:"]


CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if not path.name.startswith("adapter_"))


def test_there_are_configurations() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_parses(path: Path) -> None:
    request = parse_finetune(["--config", str(path)])
    assert request.config.data.train
    assert (request.resume, request.dry_run) == (None, False)


def test_the_papers_form_is_one_setting() -> None:
    form = ROOT / "configs" / "adapter_paper.yaml"
    config = parse_finetune(
        ["--config", str(ROOT / "configs" / "small_gpu.yaml"), "--adapter", str(form)]
    ).config.adapter
    assert config == paper(prompt_init_std=1.0)


FORBIDDEN_MODULES = ("dill", "shelve", "marshal", "cloudpickle", "joblib")


@pytest.mark.parametrize(
    "path", [*SOURCES, *SCRIPTS, *BENCHMARKS], ids=lambda path: str(path.relative_to(ROOT))
)
def test_nothing_unsafe_is_called(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.isascii()
    tree = ast.parse(text)
    for name in imported(tree):
        assert name.split(".")[0] not in FORBIDDEN_MODULES, f"{path}: imports {name}"
        assert not name.startswith("pickle.") or name == "pickle.UnpicklingError", f"{path}: imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            assert node.attr == "UnpicklingError", f"{path}:{node.lineno}: pickle.{node.attr}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno}: bare except"
        if isinstance(node, ast.keyword):
            assert node.arg != "trust_remote_code", f"{path}:{node.lineno}"
            assert node.arg != "allow_pickle", f"{path}:{node.lineno}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load"), (
                f"{path}:{node.lineno}: {called}"
            )
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called == "torch.load":
                assert given.get("weights_only") == "True", f"{path}:{node.lineno}: torch.load"
            if called.endswith(("load_state_dict", "load_model")):
                assert given.get("strict", "True") != "False", f"{path}:{node.lineno}: strict=False"
            assert given.get("shell") != "True", f"{path}:{node.lineno}: shell=True"
            assert not called.endswith((".extractall", ".mktemp", ".load_from_checkpoint")), (
                f"{path}:{node.lineno}: {called}"
            )


def test_the_check_above_sees_what_it_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these must fail it."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for number, line in enumerate(
        [
            "import pickle\npickle.loads(data)",
            "from pickle import load",
            "import dill",
            "torch.load(path)",
            "torch.load(path, weights_only=False)",
            "yaml.load(text)",
            "f(trust_remote_code=True)",
            "model.load_state_dict(state, strict=False)",
            "subprocess.run(text, shell=True)",
            "archive.extractall(folder)",
            "Module.load_from_checkpoint(path)",
            "try:\n    f()\nexcept:\n    g()",
        ]
    ):
        path = tmp_path / f"bad{number}.py"
        path.write_text(line + "\n")
        with pytest.raises(AssertionError):
            test_nothing_unsafe_is_called(path)


def test_every_library_that_is_imported_is_declared() -> None:
    """One that comes with another today may not come with it tomorrow."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in extras.keys() - {"test"} for line in extras[name])]
    declared = {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in lines}
    known = {"lit_adapter", "triton", *sys.stdlib_module_names}  # Triton is a part of torch's CUDA builds
    names = {name.split(".")[0] for tree in TREES.values() for name in imported(tree)} - known
    makers = packages_distributions()
    assert [
        n for n in sorted(names) if not {m.lower().replace("_", "-") for m in makers.get(n, [])} & declared
    ] == []


def test_the_tried_versions_are_allowed_and_complete() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    own = f"{project['name']}["  # an extra that another one includes
    declared = [line for line in extras["test"] if not line.startswith(own)]
    declared += [*project["dependencies"], *extras["serve"]]
    lines = (ROOT / "requirements" / "tried-2.13.txt").read_text().splitlines()
    tried = dict(line.split("==") for line in lines if not line.startswith("#"))
    tried = {canonicalize_name(name): version for name, version in tried.items()}
    for requirement in map(Requirement, declared):
        assert tried[canonicalize_name(requirement.name)] in requirement.specifier, requirement
