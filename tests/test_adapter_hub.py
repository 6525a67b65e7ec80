"""Adapters to and from the Hub, against a stand-in of its HTTP calls."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from generation_fixtures import save_random_adapter
from hub_stand_in import COMMIT, TOKEN, Hub, script

from lit_adapter.files.read import read_json
from lit_adapter.files.write import write_json
from lit_adapter.weights.adapter_file import AdapterInfo, read_adapter, save_adapter
from lit_adapter.weights.adapter_hub import push_adapter
from lit_adapter.weights.model_card import model_card


@pytest.fixture
def adapter(tiny_base: Path, tmp_path: Path) -> Path:
    """An adapter whose file says how it was trained, and its base where scripts look for it."""
    path = save_random_adapter(tiny_base, tmp_path / "adapter.safetensors")
    info, state = read_adapter(path)
    training = {"data": "my|records.json", "steps": 159, "val_loss": 2.65981, "lr": 0.02}
    save_adapter(path, state, AdapterInfo(**{**vars(info), "training": training}))
    shutil.copytree(tiny_base, tmp_path / "checkpoints" / "tiny")
    return path


def push(tmp_path: Path, hub: type[Hub], *arguments: object, **variables: str):
    variables = {"HF_TOKEN": TOKEN, **variables}
    return script(tmp_path, hub.address, *arguments, name="push.py", **variables)


def test_pushed_and_fetched_it_is_the_same_file(tmp_path: Path, hub: type[Hub], adapter: Path) -> None:
    done = push(tmp_path, hub, adapter, "me/my-adapter", "--private")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == f"pushed adapter.safetensors: {hub.address}/me/my-adapter/commit/{COMMIT}"
    assert second == "a model card has been written; fill in the licence there"
    assert hub.made == {"me/my-adapter": True}
    repository = hub.repositories["me/my-adapter"]
    assert (repository / "adapter.safetensors").read_bytes() == adapter.read_bytes()
    assert hub.cards == [(repository / "README.md").read_text()]

    fetched = script(tmp_path, hub.address, "me/my-adapter", "--adapter")
    assert fetched.returncode == 0, fetched.stderr
    assert fetched.stdout.splitlines() == [
        "wrote out/my-adapter.safetensors",
        "its base checkpoints/tiny is there",
    ]
    assert (tmp_path / "out" / "my-adapter.safetensors").read_bytes() == adapter.read_bytes()
    again = script(tmp_path, hub.address, "me/my-adapter", "--adapter")
    assert again.stdout.splitlines()[0] == "out/my-adapter.safetensors is already there"
    (tmp_path / "out" / "my-adapter.safetensors").write_text("precious")
    other = script(tmp_path, hub.address, "me/my-adapter", "--adapter")
    assert other.returncode == 2
    assert (
        "out/my-adapter.safetensors: already there with other content; choose another --out" in other.stderr
    )


def test_the_card_says_what_the_file_says(tmp_path: Path, hub: type[Hub], adapter: Path) -> None:
    info = read_adapter(adapter)[0]
    base = tmp_path / "checkpoints" / "tiny"
    text = model_card(info, "me/my-adapter", base)
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {"library_name": "lit_adapter", "tags": ["llama-adapter"]}
    assert "# license: yours to fill in" in head
    for part in (
        "# my-adapter",
        "A LLaMA-Adapter V1: 732 trained parameters",
        "Prompts of 5 rows in the top 3 of 4 layers, gates of form `tanh`",
        "`tiny`",
        info.base.weights,
        "    ### Instruction:\n    {instruction}",
        "| data | my\\|records.json |",
        "| optimizer steps taken | 159 |",
        "| held-out loss (nats per target) | 2.66 |",
        "python scripts/download.py me/my-adapter --adapter",
    ):
        assert part in body
    fingerprint = read_json(base / "fingerprint.json")
    write_json(base / "fingerprint.json", {**fingerprint, "source": {"model": "org/tiny"}})
    _, head, body = model_card(info, "me/my-adapter", base).split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == "org/tiny"
    assert "## Base\n\n`tiny` (org/tiny)\n" in body
    write_json(base / "fingerprint.json", {**fingerprint, "source": {"model": "tiny"}})
    assert "## Base\n\n`tiny`\n" in model_card(info, "me/my-adapter", base)


def test_another_base_of_that_name_is_not_the_adapters_base(
    tmp_path: Path, hub: type[Hub], adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its origin does not come onto the card, and a fetched adapter's base is not "there"."""
    monkeypatch.chdir(tmp_path)
    fingerprint = tmp_path / "checkpoints" / "tiny" / "fingerprint.json"
    known = {**read_json(fingerprint), "source": {"model": "org/tiny"}}
    write_json(fingerprint, known)
    assert '\nbase_model: "org/tiny"\n' in str(push_adapter(adapter, "me/x", dry_run=True)[1])
    write_json(fingerprint, {**known, "weights": "0" * 64})
    assert "org/tiny" not in str(push_adapter(adapter, "me/x", dry_run=True)[1])
    hub.repositories["me/x"] = tmp_path / "hub"
    hub.repositories["me/x"].mkdir()
    shutil.copy(adapter, hub.repositories["me/x"] / "adapter.safetensors")
    fetched = script(tmp_path, hub.address, "me/x", "--adapter")
    assert fetched.stdout.splitlines()[1] == ("its base is not checkpoints/tiny: fetch or convert it")


def test_a_card_that_is_there_stays(tmp_path: Path, hub: type[Hub], adapter: Path) -> None:
    assert push(tmp_path, hub, adapter, "me/mine").returncode == 0
    card = hub.repositories["me/mine"] / "README.md"
    card.write_text("---\nlicense: apache-2.0\n---\nmine")
    done = push(tmp_path, hub, adapter, "me/mine")
    assert done.stdout.splitlines()[1] == "the repository's model card is unchanged; --card FILE replaces it"
    assert card.read_text().endswith("mine")
    own = tmp_path / "card.md"
    own.write_text("---\nlicense: mit\n---\nanother")
    assert push(tmp_path, hub, adapter, "me/mine", "--card", own).returncode == 0
    assert card.read_text() == own.read_text()


def test_a_dry_run_shows_all_that_a_push_would_send(tmp_path: Path, hub: type[Hub], adapter: Path) -> None:
    """Without a login, and without a Hub that could be reached."""
    without = {"HF_TOKEN": "", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = push(tmp_path, hub, adapter, "me/mine", "--dry-run", **without)
    assert (done.returncode, done.stderr, hub.repositories) == (0, "", {})
    first, file, card, empty, text = done.stdout.split("\n", 4)
    assert first == "dry run: nothing was sent to me/mine; it would get"
    assert file.split(maxsplit=1) == [
        "adapter.safetensors",
        f"{adapter.stat().st_size:,} bytes, from adapter.safetensors",
    ]
    assert card.split(maxsplit=1) == ["README.md", "this model card, if the repository has none yet:"]
    assert push(tmp_path, hub, adapter, "me/mine").returncode == 0
    assert (empty, text) == ("", f"{hub.cards[0]}\n")
    own = tmp_path / "card.md"
    own.write_text("mine")
    assert push(tmp_path, hub, adapter, "me/x", "--card", own, "--dry-run").stdout.endswith(
        "this model card:\n\nmine\n"
    )
    refused = push(tmp_path, hub, adapter, "a b/c", "--dry-run", **without)
    assert (refused.returncode, refused.stderr) == (
        2,
        "error: 'a b/c' is not a name on the Hub; expected org/name\n",
    )


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["adapter.safetensors", "me/x"], {"HF_TOKEN": ""}, "not logged in to the Hub; run 'hf auth login'"),
        (
            ["adapter.safetensors", "me/x"],
            {"HF_TOKEN": "bad"},
            "me/x: this login is not permitted to do that (",
        ),
        (["adapter.safetensors", "others/x"], {}, "others/x: this login is not permitted to do that ("),
        (["adapter.safetensors", "a b/c"], {}, "'a b/c' is not a name on the Hub; expected org/name"),
        (["adapter.safetensors", "x"], {}, "'x' is not a name on the Hub; expected org/name"),
        (["nowhere.safetensors", "me/x"], {}, "nowhere.safetensors: no such adapter file"),
        (
            ["checkpoints/tiny/model.safetensors", "me/x"],
            {},
            "checkpoints/tiny/model.safetensors: not an adapter",
        ),
        (["adapter.safetensors", "me/x", "--card", "none.md"], {}, "none.md: cannot read: No such file"),
        (
            ["adapter.safetensors", "me/x"],
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "me/x: the Hub cannot be reac",
        ),
    ],
)
def test_what_cannot_be_pushed(
    tmp_path: Path,
    hub: type[Hub],
    adapter: Path,
    arguments: list[str],
    variables: dict[str, str],
    message: str,
) -> None:
    done = push(tmp_path, hub, *arguments, **variables)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {message}")
    assert hub.repositories == {}


def test_what_cannot_be_fetched(tmp_path: Path, hub: type[Hub]) -> None:
    for name, file, content in (
        ("org/base", "model.safetensors", b"x"),
        ("org/peft", "adapter_model.safetensors", b"x"),
        ("org/broken", "adapter.safetensors", b"broken"),
    ):
        hub.repositories[name] = tmp_path / name
        hub.repositories[name].mkdir(parents=True)
        (hub.repositories[name] / file).write_bytes(content)
    for name, message in (
        ("org/base", "org/base: has no adapter.safetensors; only adapters pushed by lit_adapter are fetched"),
        (
            "org/peft",
            "org/peft: has no adapter.safetensors; it has adapter_model.safetensors: fetch its files",
        ),
        ("org/broken", "org/broken/adapter.safetensors: damaged or not a safetensors file"),
        ("org/none", "org/none: not found on the Hub"),
        ("plain", "'plain' is not a name on the Hub; expected org/name"),
    ):
        done = script(tmp_path, hub.address, name, "--adapter")
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()
