"""Where curves go: each of Lightning's loggers, offline, and what TensorBoard shows first."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from lit_adapter.config import Config
from lit_adapter.errors import UserError
from lit_adapter.evaluation.history import history, strengths
from lit_adapter.training.finetune import finetune

FEW = (
    "--optim.max_steps",
    "3",
    "--trainer.log_every",
    "1",
    "--trainer.samples",
    "1",
    "--trainer.val_every",
    "3",
)


def run(tiny: Callable[..., Config], name: str) -> Path:
    config = tiny(*FEW, "--trainer.logger", name, out=name)
    assert finetune(config, say=lambda line: None) == 0
    return Path(config.out)


def test_tensorboard_opens_on_losses_and_has_few_cards(tiny: Callable[..., Config]) -> None:
    """Cards are in the order of their names; layers are one picture, and a tensor without a card."""
    folder = run(tiny, "tensorboard")
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    tags = events.Reload().Tags()
    cards = sorted(tags["scalars"] + tags["images"] + tags["histograms"])
    assert cards[:2] == ["loss/held_out", "loss/train"]
    assert len(cards) == 12
    assert [event.step for event in events.Tensors("prefix/strength_by_head")] == [1, 2, 3]
    of = history(folder / "adapter.safetensors")
    assert [step for step, _ in of.train] == [1, 2, 3]
    assert sorted(of.gates) == [1, 2, 3]
    last = strengths(folder / "adapter.safetensors")
    assert of.gates[3].keys() == last.keys()
    assert all(row == pytest.approx(last[layer], rel=1e-5) for layer, row in of.gates[3].items())


def test_hyperparameters_stand_beside_the_newest_losses(tiny: Callable[..., Config]) -> None:
    folder = run(tiny, "tensorboard")
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    start = plugin_data_pb2.HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    )
    given = start.session_start_info.hparams
    assert given["optim.max_steps"].number_value == 3
    assert given["adapter.gate"].string_value == "token"
    assert given["seed"].number_value >= 0
    assert not {"out", "adapter.lora.on", "adapter.head", "trainer.samples"} & set(given)
    experiment = plugin_data_pb2.HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    )
    names = [metric.name.tag for metric in experiment.experiment.metric_infos]
    assert names == ["loss/held_out", "loss/train"]
    first = [setting.name for setting in experiment.experiment.hparam_infos if setting.differs]
    assert sorted(first) == ["adapter.gate", "adapter.prompt_length", "optim.lr", "seed"]
    for name in names:
        assert events.Scalars(name)[-1].step == 3


def test_a_csv_file_has_the_same_curves_and_a_resume_goes_on(tiny: Callable[..., Config]) -> None:
    drawn = history(run(tiny, "tensorboard") / "adapter.safetensors")
    folder = run(tiny, "csv")
    [path] = folder.glob("csv/version_*/metrics.csv")
    with path.open() as stream:
        rows = list(csv.DictReader(stream))
    assert {"loss/train", "loss/held_out", "optim/lr", "prefix/strength"} <= rows[0].keys()
    found = history(folder / "adapter.safetensors").train
    assert dict(found) == pytest.approx(dict(drawn.train), rel=1e-6)
    assert not (folder / "tensorboard").exists()
    longer = tiny(*FEW, "--trainer.logger", "csv", "--optim.max_steps", "5", out="csv")
    assert finetune(longer, resume="last", say=lambda line: None) == 0
    assert [step for step, _ in history(folder / "adapter.safetensors").train] == [1, 2, 3, 4, 5]


def test_wandb_writes_offline(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    import wandb

    folder = run(tiny, "wandb")
    wandb.teardown()  # returns when the file is whole; `finish` returns before
    [stored] = folder.glob("wandb/offline-run-*/*.wandb")
    content = stored.read_bytes()
    for name in (
        b"loss/train",
        b"loss/held_out",
        b"optim.max_steps",
        b"prefix/layers_by_heads",
        b"samples/0",
    ):
        assert name in content, name


def test_mlflow_writes_to_a_folder(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = run(tiny, "mlflow")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"file:{folder / 'mlruns'}")
    experiment = client.get_experiment_by_name("lit_adapter")
    [found] = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "mlflow"
    assert found.info.status == "FINISHED"
    assert found.data.params["optim.max_steps"] == "3"
    assert [point.step for point in client.get_metric_history(found.info.run_id, "loss/train")] == [1, 2, 3]
    kept = [path.path for path in client.list_artifacts(found.info.run_id)]
    assert {"samples", "images"} <= set(kept)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_named_first(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    config = tiny("--trainer.logger", name, out=name)
    with pytest.raises(UserError, match=rf"trainer.logger is {name}, which is not installed; pip install"):
        finetune(config, say=lambda line: None)
    assert not list(Path(config.out).glob("*"))
