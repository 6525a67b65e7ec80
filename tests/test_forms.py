"""An adapter's form is part of what identifies it: in its file, in a checkpoint, and in its model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from generation_fixtures import save_random_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lit_adapter.config import Config
from lit_adapter.model.config import AdapterConfig
from lit_adapter.training.differences import differences
from lit_adapter.training.run_identity import RunIdentity, run_identity
from lit_adapter.weights.adapter_file import METADATA_KEY, read_adapter
from lit_adapter.weights.model_card import model_card

LATER = ("prefix_query", "norms", "lora")
"""Fields that files and checkpoints of earlier versions lack."""


def identity(adapter: AdapterConfig) -> RunIdentity:
    return run_identity(Config(adapter=adapter))


def without_later(run: RunIdentity) -> RunIdentity:
    kept = {key: value for key, value in run.identity.items() if key.partition(".")[2] not in LATER}
    assert len(kept) == len(run.identity) - len(LATER)
    return RunIdentity(kept, run.changeable, run.steps)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_checkpoint_of_an_earlier_version_goes_on(version: Any) -> None:
    config = Config(adapter=AdapterConfig(version=version, norms=False))
    own = run_identity(config)
    assert not differences(without_later(own), own, config)
    other = identity(AdapterConfig(version=version, norms=False, prefix_query="unrotated"))
    (found,) = differences(without_later(own), other, config)
    assert found == "adapter.prefix_query was 'rotated', now 'unrotated'"


def test_v2_trains_norms_whatever_the_setting_says() -> None:
    plain, said = (AdapterConfig(version="v2", norms=norms) for norms in (False, True))
    assert plain.parts == said.parts == ("prefix", "norms", "linears")
    assert identity(plain) == identity(said)
    assert identity(AdapterConfig(norms=False)) != identity(AdapterConfig(norms=True))


def test_a_file_of_an_earlier_version_is_of_the_rotated_form(tiny_base: Path, tmp_path: Path) -> None:
    path = save_random_adapter(tiny_base, tmp_path / "a.safetensors")
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()[METADATA_KEY])
    assert (told["adapter"].pop("prefix_query"), told["adapter"].pop("norms")) == ("rotated", False)
    del told["adapter"]["lora"]
    save_file(load_file(path), path, {METADATA_KEY: json.dumps(told)})
    found = read_adapter(path)[0].adapter
    assert (found.prefix_query, found.norms) == ("rotated", False)


def test_a_model_card_says_the_form(tiny_base: Path, tmp_path: Path) -> None:
    config = AdapterConfig(prompt_length=5, layers=3, gate="token", prefix_query="unrotated", norms=True)
    path = save_random_adapter(tiny_base, tmp_path / "a.safetensors", config=config)
    card = model_card(read_adapter(path)[0], "me/it", tiny_base)
    assert "gates of form `token`. Queries attend to them before rotary positions are applied." in card
    assert " The weights of these layers' norms and of the last." in card
