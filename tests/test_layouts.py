"""One run on different layouts: one process, two with DDP, with FSDP2, and with tensor parallelism."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from finetune_runs import TINY, Stopper
from safetensors.torch import load_file, save_file

from lit_adapter.config import Config, TrainerConfig
from lit_adapter.device import own_device
from lit_adapter.errors import UserError
from lit_adapter.training import processes
from lit_adapter.training.finetune import finetune
from lit_adapter.training.signals import Signals, check_launcher
from lit_adapter.training.strategy import check_layout
from lit_adapter.weights.adapter_file import read_adapter
from lit_adapter.weights.base_content import tensor_checksums
from lit_adapter.weights.base_folder import FINGERPRINT

TESTS = Path(__file__).parent
TWO = ("--trainer.devices", "2", "--trainer.strategy")
HEADS = ("--trainer.tensor_parallel", "2")
FORM = ("--adapter.gate", "token", "--adapter.prefix_query", "unrotated", "--adapter.norms", "true")
SECONDS = 600
"""What a run may take: seconds on a free machine, minutes on one that others use."""


@pytest.fixture
def arguments(tiny_base: Path, tiny_records: Path) -> list[str]:
    script = str(TESTS / "watched_run.py")
    return [script, "--config", str(TINY), "--base", str(tiny_base), "--data.train", str(tiny_records)]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "WATCHED": str(tmp_path)}


def ended(process: subprocess.Popen[str]) -> str:
    """Wait for a process that must succeed and return what it printed; leave none behind."""
    try:
        output, errors = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return output


def start(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *arguments], env=environment, **pipes)


def assert_same_adapter(one: Path, other: Path) -> None:
    one_state, other_state = (load_file(out / "adapter.safetensors") for out in (one, other))
    assert one_state.keys() == other_state.keys()
    for name, tensor in one_state.items():
        # AdamW divides rounding by gradients that are small.
        torch.testing.assert_close(other_state[name], tensor, rtol=0, atol=5e-6, msg=name)


@pytest.mark.slow
@pytest.mark.timeout(3 * SECONDS)
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (("ddp",), ("--adapter.norms", "true")),
        (("fsdp2",), ("--adapter.version", "v2", "--trainer.recompute", "true")),
        (("fsdp2",), ("--adapter.lora.rank", "2", "--optim.eps", "1e-3")),
        (("fsdp2",), ("--adapter.layers", "2")),
        (("fsdp2", "--trainer.whole_layers", "1"), ("--adapter.norms", "true")),
        (("fsdp2", *HEADS), (*FORM, "--trainer.recompute", "true")),
    ],
    ids=["ddp", "fsdp2", "lora", "few layers", "whole layers", "heads"],
)
def test_two_processes_take_the_steps_of_one(
    tiny: Callable[..., Config],
    arguments: list[str],
    environment: dict[str, str],
    tmp_path: Path,
    layout: tuple[str, ...],
    options: tuple[str, ...],
) -> None:
    """Losses and adapter are the same; DDP exchanges gradients only, FSDP2 also shards of the base."""
    options = (*options, "--optim.max_steps", "5")
    finetune(tiny(*options, out="one"), say=Stopper())
    out = tmp_path / "two"
    ended(start([*arguments, "--out", str(out), *options, *TWO, *layout], environment))
    assert_same_adapter(tmp_path / "one", out)
    one, two = (read_adapter(path / "adapter.safetensors")[0] for path in (tmp_path / "one", out))
    for key in ("train_loss", "val_loss"):
        assert two.training[key] == pytest.approx(one.training[key], abs=1e-5)
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["adapter"] == ranks[1]["adapter"]
    n_trained = sum(tensor.numel() for tensor in load_file(out / "adapter.safetensors").values())
    for rank in ranks:
        exchanged = rank["exchanged"]
        if "--trainer.tensor_parallel" not in layout:
            assert 5 * n_trained <= exchanged["gloo:all_reduce"] < 5 * n_trained + 200
            assert exchanged["gloo:broadcast"] < 1000  # some paths and flags; the base has 95,664 numbers
        gathers = layout[0] == "fsdp2" and "--trainer.tensor_parallel" not in layout
        assert ("gloo:all_gather" in exchanged) == gathers
        assert not any("reduce_scatter" in name for name in exchanged)


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS)
def test_a_record_whose_loss_is_nan_is_named_before_a_sharded_run_begins(
    tiny_base: Path, arguments: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(tiny_base, base)
    weights = base / "model.safetensors"
    state = load_file(weights)
    state["model.layers.0.mlp.down_proj.weight"][3, 3] = torch.nan
    save_file(state, weights)
    about = json.loads((base / FINGERPRINT).read_text())  # as if it had been converted from such a file
    about |= {"tensor_crc32": tensor_checksums(base)}
    about["files"]["model.safetensors"] = weights.stat().st_size
    (base / FINGERPRINT).write_text(json.dumps(about))
    script = str(TESTS.parent / "scripts" / "finetune.py")
    options = ["--base", str(base), "--out", str(out), *TWO, "fsdp2"]
    process = start([script, *arguments[1:], *options], environment)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 2
    [line] = set(errors.splitlines())  # the second process may come to say it too
    assert re.fullmatch(r"error: .*tiny\.json:\d+: the loss on this record is nan under .*", line)
    assert not out.exists()


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def on_two_nodes(arguments: list[str], environment: dict[str, str]) -> None:
    """Let torchrun start one process on each of two nodes, which are both this machine."""
    port = free_port()
    nodes = []
    for node in range(2):
        rendezvous = ["--nnodes", "2", "--node-rank", str(node), "--master-addr", "127.0.0.1"]
        launcher = [
            "-m",
            "torch.distributed.run",
            *rendezvous,
            "--master-port",
            port,
            "--nproc-per-node",
            "1",
        ]
        nodes.append(start([*launcher, *arguments, "--trainer.num_nodes", "2"], environment))
    for node in nodes:
        ended(node)


@pytest.mark.slow
@pytest.mark.timeout(3 * SECONDS)
def test_a_run_goes_on_on_another_layout(
    tiny: Callable[..., Config], arguments: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    """One process, FSDP2, tensor parallelism, two nodes with DDP, one process: two steps each."""
    constant = ["--optim.schedule", "constant", "--optim.warmup", "0", "--trainer.save_every", "100"]
    constant += ["--trainer.samples", "0"]
    out, steps = tmp_path / "moved", "--optim.max_steps"
    moved = [*arguments, "--out", str(out), *constant, "--resume", "last"]
    finetune(tiny(*constant, steps, "10", out="whole"), say=Stopper())
    finetune(tiny(*constant, steps, "2", out="moved"), say=Stopper())
    ended(start([*moved, steps, "4", *TWO, "fsdp2"], environment))
    ended(start([*moved, steps, "6", *TWO, "fsdp2", *HEADS], environment))
    on_two_nodes([*moved, steps, "8", "--trainer.strategy", "ddp"], environment)
    finetune(tiny(*constant, steps, "10", out="moved"), resume="last", say=Stopper())
    assert_same_adapter(tmp_path / "whole", out)


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An environment that no launcher has touched."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    for name in ("MASTER_ADDR", "NODE_RANK", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        ({}, {"num_nodes": 2}, "num_nodes is 2, but nothing started this run on the other nodes"),
        ({"MASTER_ADDR": "node0"}, {"num_nodes": 2}, "nothing started this run on the other nodes"),
        ({"MASTER_ADDR": "node0", "NODE_RANK": "1"}, {"num_nodes": 2}, None),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4"}, {"num_nodes": 2, "devices": 2}, None),
        (
            {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4"},
            {"devices": 2},
            "torchrun started 4 processes, but trainer.num_nodes 1 times trainer.devices 2 is 2",
        ),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "train"}, {"devices": 2}, None),
        (
            {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train"},
            {"devices": 2},
            "SLURM started 1 process, but trainer.num_nodes 1 times trainer.devices 2 is 2",
        ),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash"}, {"devices": 2}, None),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, {"devices": 2}, None),
        (
            {"LOCAL_RANK": "1", "WORLD_SIZE": "2"},
            {},
            "a launcher started 2 processes, but trainer.num_nodes 1 times trainer.devices 1 is 1",
        ),
        ({}, {"devices": 9999}, "trainer.devices is 9999, but this machine has"),
    ],
)
def test_a_layout_that_would_wait_forever_is_refused(
    no_launcher: pytest.MonkeyPatch, environment: dict[str, str], options: dict[str, Any], message: str | None
) -> None:
    for name, value in environment.items():
        no_launcher.setenv(name, value)
    if message is None:
        check_layout(TrainerConfig(**options), torch.device("cpu"))
    else:
        with pytest.raises(UserError, match=message):
            check_layout(TrainerConfig(**options), torch.device("cpu"))


def test_of_eight_processes_on_a_node_the_one_that_dies_is_named(
    no_launcher: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On the second of two nodes; all of them know how many there are and where they meet."""
    code = (
        "import json, os, pathlib, signal, sys, time; rank = os.environ['LOCAL_RANK']\n"
        "place = pathlib.Path(sys.argv[1]) / rank\n"
        "place.with_suffix('.part').write_text(json.dumps(dict(os.environ)))\n"
        "place.with_suffix('.part').rename(place)\n"
        "while rank == '5' and len([*place.parent.glob('?')]) < 7: time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGKILL) if rank == '5' else time.sleep(600)"
    )
    started: list[subprocess.Popen[bytes]] = []

    def popen(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(*arguments, **options))
        return started[-1]

    no_launcher.setattr(processes, "subprocess", SimpleNamespace(Popen=popen))
    no_launcher.setattr(sys, "orig_argv", ["python", "-c", code, str(tmp_path)])
    no_launcher.setattr(os, "environ", {**os.environ, "MASTER_ADDR": "node0", "NODE_RANK": "1"})
    said: Queue[str] = Queue()
    options = TrainerConfig(num_nodes=2, devices=8)
    try:
        processes.start_processes(options, torch.device("cpu"), said.put)
        sentence = said.get(timeout=250)
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert sentence == f"process 13 (pid {started[4].pid}) was killed by signal 9"
    found = [json.loads((tmp_path / f"{rank}").read_text()) for rank in range(1, 8)]
    assert len(found) == len(started)
    assert [one["LOCAL_RANK"] for one in found] == [*"1234567"]
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        assert {one[name] for one in found} == {os.environ[name]}
    assert {one["WORLD_SIZE"] for one in found} == {"16"}


WORLD = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "x"}, "RANK is 'x' in the environment; expected a whole number, or unset it"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is '' in the environment; expected a whole number"),
        ({"SLURM_NTASKS": "-1"}, "SLURM_NTASKS is '-1' in the environment"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK is 1 in the environment, but no launcher started this process"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK is 0 in the environment, but no launcher started this process"),
        ({"RANK": "1", **WORLD}, "RANK is 1 in the environment, but no launcher started this process"),
        ({"LOCAL_RANK": "1", **WORLD}, None),
        ({"LOCAL_RANK": "1", "RANK": "3", "TORCHELASTIC_RUN_ID": "x"}, None),
        ({"LOCAL_RANK": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, None),
        ({"RANK": "0"}, None),
        ({}, None),
    ],
)
def test_a_launcher_that_did_not_start_this_process(
    no_launcher: pytest.MonkeyPatch, environment: dict[str, str], message: str | None
) -> None:
    for name, value in environment.items():
        no_launcher.setenv(name, value)
    if message is None:
        check_launcher()
    else:
        with pytest.raises(UserError, match=message):
            Signals()


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({}, 0),
        ({"LOCAL_RANK": "1", **WORLD}, 1),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, 1),
        ({"LOCAL_RANK": "2", "SLURM_LOCALID": "0"}, 2),  # started by one that SLURM started
    ],
)
def test_each_process_of_a_node_has_its_own_gpu(
    no_launcher: pytest.MonkeyPatch, environment: dict[str, str], number: int
) -> None:
    for name, value in environment.items():
        no_launcher.setenv(name, value)
    assert own_device(torch.device("cuda")) == torch.device("cuda", number)
    assert own_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "16-mixed"}, "16-mixed"),
        ({"base_precision": "fp8"}, "fp8"),
        (
            {"tensor_parallel": 2, "strategy": "ddp", "devices": 2},
            "tensor_parallel is 2, which needs trainer.strategy fsdp2, not ddp",
        ),
        (
            {"tensor_parallel": 2, "devices": 3, "num_nodes": 2},
            "tensor_parallel is 2, which does not divide trainer.devices, 3",
        ),
        (
            {"whole_layers": 2, "strategy": "ddp", "devices": 2},
            "whole_layers is 2, which needs trainer.strategy fsdp2, not ddp; otherwise all layers are whole",
        ),
    ],
)
def test_what_a_sharded_base_does_not_support_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_layout(TrainerConfig(**{"strategy": "fsdp2", **options}), torch.device("cpu"))


def test_more_whole_layers_than_the_base_has_are_refused(tiny: Callable[..., Config]) -> None:
    message = r"trainer.whole_layers is 99, but the base has \d layers; lower it, or use auto"
    with pytest.raises(UserError, match=message):
        finetune(tiny(*TWO, "fsdp2", "--trainer.whole_layers", "99"), say=Stopper())


def test_heads_that_devices_cannot_share_are_refused_before_anything_is_read(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    options = ("--trainer.strategy", "fsdp2", "--trainer.tensor_parallel", "4", "--trainer.devices", "4")
    message = r"tensor_parallel is 4, .* 2 key/value heads and MLP width 64; expected one of 1, 2$"
    with pytest.raises(UserError, match=message):
        finetune(tiny(*options), say=Stopper())
    assert not Path(tiny().out).exists()
