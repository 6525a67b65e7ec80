"""The frozen trunk kept on disk: the same loss and gradients, made once, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from finetune_runs import Stopper
from random_records import encoded
from safetensors.torch import load_file
from tiny_models import open_adapter, random_llama

from lit_adapter.config import Config
from lit_adapter.data.packing import Packer, shared_heads
from lit_adapter.errors import UserError
from lit_adapter.model.adapter import adapter_parameters
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.llama import Llama
from lit_adapter.model.loss import row_loss, row_trunk
from lit_adapter.training import trunk_cache
from lit_adapter.training.finetune import finetune

LAYERS = ("--adapter.layers", "2", "--optim.max_steps", "11")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layers", [1, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradients_do_not_change(seed: int, layers: int, recompute: bool) -> None:
    model = open_adapter(random_llama(seed, n_layer=6), AdapterConfig(layers=layers)).double()
    data = encoded(seed, 12, cut=True, longest=40)
    packer = Packer(data, shared_heads(data), mask_prompt=True, row_tokens=1000)
    parameters = [parameter for _, parameter in adapter_parameters(model)]
    row = packer.row(np.arange(12).tolist())
    loss = row_loss(model, row, recompute=recompute)
    wanted = torch.autograd.grad(loss, parameters)
    row.trunk = row_trunk(model, packer.row(np.arange(12).tolist()))
    model.layers[: 6 - layers].requires_grad_(False)
    for block in model.layers[: 6 - layers]:
        block.register_forward_hook(lambda *_: pytest.fail("a layer of the trunk was computed"))
    again = row_loss(model, row, recompute=recompute)
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
    for found, value in zip(torch.autograd.grad(again, parameters), wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-14)


def adapter_of(config: Config) -> dict[str, torch.Tensor]:
    return load_file(Path(config.out) / "adapter.safetensors")


def cached(folder: Path) -> tuple[str, ...]:
    return (*LAYERS, "--trainer.trunk_cache", str(folder))


def test_a_run_learns_the_same_and_a_second_one_reads_what_the_first_wrote(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, first, second = tiny(*LAYERS, out="plain"), *(tiny(*cached(tmp_path), out=f"{n}") for n in "12")
    lines = Stopper()
    assert finetune(plain, say=Stopper()) == finetune(first, say=lines) == 0
    for name, value in adapter_of(first).items():
        torch.testing.assert_close(value, adapter_of(plain)[name], rtol=0, atol=1e-6)
    written = {path: path.read_bytes() for path in tmp_path.glob("trunk-*.safetensors")}
    assert len(written) == 2  # of training and of held-out records
    said = next(line for line in lines.lines if line.startswith("trunk cache:"))
    assert f"{sum(map(len, written.values())):,} bytes into {tmp_path}; " in said
    monkeypatch.setattr(trunk_cache, "row_trunk", lambda *_: pytest.fail("computed again"))
    monkeypatch.setattr(Llama, "n_trunk", 2)  # what is below has no part in the steps
    assert finetune(second, say=Stopper()) == 0
    assert (Path(second.out) / "adapter.safetensors").read_bytes() == (
        Path(first.out) / "adapter.safetensors"
    ).read_bytes()
    assert written == {path: path.read_bytes() for path in tmp_path.glob("trunk-*.safetensors")}


def test_a_resumed_run_ends_in_the_same_bytes(tiny: Callable[..., Config], tmp_path: Path) -> None:
    options = (*cached(tmp_path), "--data.workers", "2")
    whole, stopped = tiny(*options, out="whole"), tiny(*options, out="stopped")
    assert finetune(whole, say=Stopper()) == 0
    assert finetune(stopped, say=Stopper("step 6/")) == 143
    assert finetune(stopped, resume="last", say=Stopper()) == 0
    for name in ("adapter.safetensors", "best.safetensors"):
        assert (Path(stopped.out) / name).read_bytes() == (Path(whole.out) / name).read_bytes()


def test_a_signal_while_it_is_filled_leaves_no_part_of_it(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    config, folder = tiny(*cached(tmp_path / "trunks")), tmp_path / "trunks"
    assert finetune(config, say=Stopper("trunk cache: computing")) == 143
    assert list(folder.iterdir()) == []
    assert finetune(config, resume="last", say=Stopper()) == 0
    assert len(list(folder.iterdir())) == 2


def test_other_numbers_are_kept_apart(tiny: Callable[..., Config], tmp_path: Path) -> None:
    for number, options in enumerate(
        [(), ("--adapter.layers", "3"), ("--data.template", "{instruction} {input}")]
    ):
        assert finetune(tiny(*cached(tmp_path), *options, out=f"run-{number}"), say=Stopper()) == 0
    assert len(list(tmp_path.glob("trunk-*"))) == 6
    other = Path(shutil.copytree(tiny().base, tmp_path / "base"))  # the same weights under other norms
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert finetune(tiny(*cached(tmp_path), "--base", str(other), out="run-3"), say=Stopper()) == 0
    assert len(list(tmp_path.glob("trunk-*"))) == 8


def test_a_damaged_part_is_named_and_not_learned_from(tiny: Callable[..., Config], tmp_path: Path) -> None:
    assert finetune(tiny(*cached(tmp_path), out="one"), say=Stopper()) == 0
    path = max(tmp_path.glob("trunk-*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path.name}: damaged at part \d+; delete it"):
        finetune(tiny(*cached(tmp_path), out="two"), say=Stopper())


def test_a_file_that_was_cut_is_made_again(tiny: Callable[..., Config], tmp_path: Path) -> None:
    assert finetune(tiny(*cached(tmp_path), out="one"), say=Stopper()) == 0
    path = max(tmp_path.glob("trunk-*"), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    assert finetune(tiny(*cached(tmp_path), out="two"), say=Stopper()) == 0
    assert path.read_bytes() == content


def test_what_cannot_be_kept_is_refused(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ("--trainer.trunk_cache", str(tmp_path / "trunks"))
    for options in (("--adapter.layers", "4"), ("--adapter.version", "v2")):
        with pytest.raises(
            UserError, match=r"trainer.trunk_cache is set, but every layer of the base learns"
        ):
            finetune(tiny(*folder, *options), say=Stopper())
    full = tmp_path / "trunks"
    full.mkdir()
    free = {full: 1000}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free.get(path, 10**12)))
    with pytest.raises(UserError, match=r"trunk cache: [\d,]+ bytes into .*trunks, but 1,000 are free; name"):
        finetune(tiny(*folder, *LAYERS), say=Stopper())
    assert not Path(tiny().out).exists()
    assert list(full.iterdir()) == []
