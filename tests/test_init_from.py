"""Runs that start from an adapter file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from convert_sources import random_llama, write_hf
from finetune_runs import Stopper
from generation_fixtures import save_random_adapter

from lit_adapter.cli.finetune import parse_finetune
from lit_adapter.config import Config
from lit_adapter.errors import UserError
from lit_adapter.training.checkpoint import read_checkpoint
from lit_adapter.training.finetune import finetune
from lit_adapter.weights.adapter_file import read_adapter
from lit_adapter.weights.convert import convert

FORM = (
    *("--adapter.layers", "3", "--adapter.prompt_length", "5", "--adapter.gate", "tanh"),
    *("--adapter.norms", "false", "--optim.max_steps", "4"),
)


@pytest.mark.slow
def test_a_run_starts_from_the_file_and_resumes_to_the_byte(
    tiny: Callable[..., Config], tiny_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    start = save_random_adapter(tiny_base, tmp_path / "run" / "adapter.safetensors", seed=3)
    still = tiny(*FORM, "--optim.lr", "0", "--init-from", str(start.parent), out="still")
    lines = Stopper()
    finetune(still, say=lines)
    assert f"starting from {start}" in lines.lines
    found, given = (read_adapter(path)[1] for path in (Path(still.out) / "adapter.safetensors", start))
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())

    options = [*FORM, f"--init-from={start}"]
    finetune(tiny(*options, out="whole"), say=Stopper())
    finetune(tiny(*options, out="cut"), say=Stopper("step 2/"))
    finetune(tiny(*options, out="cut"), resume="last", say=Stopper())
    whole, cut = (Path(tiny(out=out).out) / "adapter.safetensors" for out in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()
    checkpoint = read_checkpoint(whole.parent / "checkpoints" / "step-0000004.ckpt")
    assert len(checkpoint["lit_adapter"]["identity"]["init_from"]) == 16
    assert parse_finetune(["--config", str(whole.parent / "config.yaml")])[0].init_from == str(start)


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["step 0:", "step 2/"])
def test_a_start_that_is_gone_is_not_needed_to_resume(
    tiny: Callable[..., Config], tiny_base: Path, tmp_path: Path, stop: str
) -> None:
    start = save_random_adapter(tiny_base, tmp_path / "start.safetensors", seed=3)
    options = [*FORM, "--init-from", str(start)]
    finetune(tiny(*options, out="whole"), say=Stopper())
    assert finetune(tiny(*options, out="cut"), say=Stopper(stop)) == 143
    start.unlink()
    with pytest.raises(UserError, match=r"start\.safetensors: no such adapter file"):
        finetune(tiny(*options, out="fresh"), say=Stopper())
    lines = Stopper()
    finetune(tiny(*options, out="cut"), resume="last", say=lines)
    assert f"{start}: is gone, but not needed: the checkpoint has the adapter trained from it" in lines.lines
    whole, cut = (Path(tiny(out=out).out) / "adapter.safetensors" for out in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


def test_a_run_without_a_start_gets_none_when_it_is_resumed(tiny: Callable[..., Config]) -> None:
    finetune(tiny(), say=Stopper("step 1/"))
    with pytest.raises(UserError, match=r"^nowhere\.safetensors: no such adapter file"):
        finetune(tiny("--init-from", "nowhere.safetensors"), resume="last", say=Stopper())


def test_another_start_is_another_run(tiny: Callable[..., Config], tiny_base: Path, tmp_path: Path) -> None:
    one, two = (save_random_adapter(tiny_base, tmp_path / f"{n}.safetensors", seed=n) for n in (1, 2))
    finetune(tiny(*FORM, "--init-from", str(one)), say=Stopper())
    changed = f"init_from {two}: is not the file that the run started from"
    for options, message in ((["--init-from", str(two)], changed), ([], "init_from was a file, now unset")):
        with pytest.raises(UserError, match=rf"cannot resume another run: {message}$"):
            finetune(tiny(*FORM, "--optim.epochs", "5", *options), resume="last", say=Stopper())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--adapter.gate", "identity"],
            r"it has adapter\.gate tanh \(here identity\); set them to the same values",
        ),
        (
            ["--adapter.layers", "2", "--adapter.prompt_length", "9"],
            r"length 5 \(here 9\), adapter\.layers 3 \(her",
        ),
        (["--adapter.gate", "token"], r"it has adapter\.gate tanh \(here token\)"),
        (["--adapter.prefix_query", "unrotated"], r"adapter\.prefix_query rotated \(here unrotated\)"),
        (["--adapter.norms", "true"], r"it has adapter\.norms False \(here True\)"),
        (["--adapter.version", "v2"], r"it has adapter\.version v1 \(here v2\)"),
    ],
)
def test_a_start_of_another_form(
    tiny: Callable[..., Config], tiny_base: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    start = save_random_adapter(tiny_base, tmp_path / "start.safetensors")
    config = tiny(*FORM, "--init-from", str(start), *options)
    with pytest.raises(UserError, match=rf"{start}: cannot start from it: .*{message}"):
        finetune(config, say=Stopper())


def test_a_start_on_another_base(tiny: Callable[..., Config], tiny_base: Path, tmp_path: Path) -> None:
    write_hf(random_llama(hidden_size=48, num_hidden_layers=4, num_attention_heads=4), tmp_path / "source")
    other = convert(tmp_path / "source", tmp_path / "other")
    start = save_random_adapter(other, tmp_path / "start.safetensors")
    with pytest.raises(
        UserError, match=r"start\.safetensors: trained on base 'other' \(\w+\), not on 'tiny'"
    ):
        finetune(tiny(*FORM, "--init-from", str(start)), say=Stopper())


def test_no_such_start(tiny: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"^nowhere\.safetensors: no such adapter file"):
        finetune(tiny("--init-from", "nowhere.safetensors"), say=Stopper())
    with pytest.raises(UserError, match="init_from is empty; name an adapter"):
        tiny("--init-from=")
