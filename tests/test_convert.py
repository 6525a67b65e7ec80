from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import signal
import tempfile
import zlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from convert_sources import interleaved, random_llama, write_gguf, write_hf, write_meta
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from warm_runs import run_code

from lit_adapter.errors import UserError
from lit_adapter.model.config import LlamaConfig
from lit_adapter.model.layout import base_shapes
from lit_adapter.model.rope_config import RopeConfig
from lit_adapter.weights import tensor_writer
from lit_adapter.weights.base_content import check_content
from lit_adapter.weights.base_folder import read_config, read_fingerprint
from lit_adapter.weights.convert import convert
from lit_adapter.weights.output_folder import LOCK, scratch_folder, sweep_leftovers
from lit_adapter.weights.source import half_split

KINDS = gguf.GGMLQuantizationType


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    ids = torch.arange(24).view(2, 12) * 19 % model.config.vocab_size
    with torch.no_grad():
        return model(ids).logits


def assert_same_model(out: Path, model: LlamaForCausalLM) -> None:
    converted = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    # A fresh model: casting one rounds its rotary frequencies too.
    original = LlamaForCausalLM(model.config).eval()
    original.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    torch.testing.assert_close(logits(converted), logits(original), rtol=0, atol=0)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("layout", ["single", "sharded", "bin", "bin-sharded"])
def test_hugging_face_layouts_keep_the_model(tmp_path: Path, layout: str) -> None:
    model = random_llama(torch.bfloat16)
    out = convert(write_hf(model, tmp_path / "source", layout), tmp_path / "out")
    assert {t.dtype for t in tensors_of(out).values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [257, 258]}
    assert_same_model(out, model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 8},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ],
    ids=["mha", "mqa", "tied", "biases", "head-dim", "rope-linear", "rope-llama3"],
)
def test_every_shape_of_llama(tmp_path: Path, sizes: dict) -> None:
    model = random_llama(**sizes)
    out = convert(write_hf(model, tmp_path / "source"), tmp_path / "out")
    names = set(model.state_dict()) - ({"lm_head.weight"} if sizes.get("tie_word_embeddings") else set())
    shapes = base_shapes(read_config(out))
    assert shapes == {name: tuple(model.state_dict()[name].shape) for name in names}
    assert_same_model(out, model)


def test_tied_head_and_inverse_frequencies_are_dropped(tmp_path: Path) -> None:
    model = random_llama(tie_word_embeddings=True)
    source = write_hf(model, tmp_path / "source", "bin")
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    torch.save(state, source / "pytorch_model.bin")
    out = convert(source, tmp_path / "out")
    assert set(tensors_of(out)) == set(model.state_dict()) - {"lm_head.weight"}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("vocabulary_cut", [False, True])
def test_meta_folders_merge_and_reorder(tmp_path: Path, ranks: int, vocabulary_cut: bool) -> None:
    # Meta takes two sizes from the shapes; 8,192 is what its LLaMA 2 and 3 leave as context.
    model = random_llama(torch.float16, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    out = convert(write_meta(model, tmp_path / "source", ranks, vocabulary_cut), tmp_path / "out")
    assert {t.dtype for t in tensors_of(out).values()} == {torch.float16}
    assert_same_model(out, model)
    assert json.loads((out / "config.json").read_text())["bos_token_id"] == 256
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [257, 265]


def test_meta_tokenizer_of_sentencepiece_in_the_folder_above(tmp_path: Path) -> None:
    model = random_llama()
    source = write_meta(model, tmp_path / "llama" / "7B")
    (source / "tokenizer.model").unlink()
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 20),
        model_writer=buffer,
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (source.parent / "tokenizer.model").write_bytes(buffer.getvalue())
    out = convert(source, tmp_path / "out")
    assert (out / "tokenizer.model").read_bytes() == buffer.getvalue()
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert_same_model(out, model)


def test_reordered_rows_give_the_attention_scores_of_metas_complex_rotation() -> None:
    torch.manual_seed(0)
    H, D, C, T = 3, 8, 16, 5
    wq, wk, x = (torch.randn(*s, dtype=torch.float64) for s in ((H * D, C), (H * D, C), (T, C)))
    frequencies = 1e4 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = torch.outer(torch.arange(T, dtype=torch.float64), frequencies)  # [T, D/2]

    def meta(w: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex((x @ w.T).view(T, H, D // 2, 2).contiguous())
        return torch.view_as_real(pairs * torch.exp(1j * angles)[:, None]).flatten(2)

    def hugging_face(w: torch.Tensor) -> torch.Tensor:
        y = (x @ w.T).view(T, H, D)
        turned = torch.cat((-y[..., D // 2 :], y[..., : D // 2]), -1)
        both = torch.cat((angles, angles), -1)[:, None]
        return y * both.cos() + turned * both.sin()

    expected = torch.einsum("thd,shd->hts", meta(wq), meta(wk))
    config = LlamaConfig(vocab_size=1, n_layer=1, n_head=H, n_kv_head=H, n_embd=C, head_dim=D, n_hidden=1)
    name = "layers.0.self_attn.{}_proj.weight"
    q, k = half_split(name.format("q"), wq, config), half_split(name.format("k"), wk, config)
    torch.testing.assert_close(torch.einsum("thd,shd->hts", hugging_face(q), hugging_face(k)), expected)
    assert torch.equal(interleaved(q, H), wq)
    assert torch.equal(half_split(name.format("q"), q, config, undo=True), wq)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q4_0", "Q5_1"])
@pytest.mark.parametrize("sizes", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 4}])
def test_gguf_types(tmp_path: Path, kind: str, sizes: dict) -> None:
    model = random_llama(**sizes)
    held = write_gguf(model, tmp_path / "model.gguf", KINDS[kind])
    out = convert(tmp_path / "model.gguf", tmp_path / "out")
    found = tensors_of(out)
    assert found.keys() == held.keys()
    for name, tensor in held.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert read_config(out).norm_eps == model.config.rms_norm_eps
    if kind == "F32":
        assert_same_model(out, model)


def test_gguf_biases(tmp_path: Path) -> None:
    model = random_llama(attention_bias=True, mlp_bias=True)
    write_gguf(model, tmp_path / "model.gguf")
    assert_same_model(convert(tmp_path / "model.gguf", tmp_path / "out"), model)


def test_gguf_rope_table_becomes_llama3_scaling(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = random_llama(rope_parameters=rope, num_attention_heads=2, num_key_value_heads=2)
    plain = 5e5 ** (-np.arange(0, 32, 2) / 32)
    scaled = model.model.rotary_emb.inv_freq.double().numpy()  # transformers' own scaling
    write_gguf(model, tmp_path / "model.gguf", rope_freqs=plain / scaled)
    out = convert(tmp_path / "model.gguf", tmp_path / "out")
    assert read_config(out).rope == RopeConfig(5e5, "llama3", 32.0, 1.0, 4.0, 8192)
    assert_same_model(out, model)


def test_large_models_are_cut_into_indexed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_llama()
    source = write_hf(model, tmp_path / "source")
    monkeypatch.setattr(tensor_writer, "MAX_FILE_BYTES", 150_000)
    out = convert(source, tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    for path in out.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert {n for n, where in index["weight_map"].items() if where == path.name} == set(file.keys())
            assert sum(file.get_tensor(n).nbytes for n in file.keys()) <= 150_000  # noqa: SIM118
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(out).values())
    assert_same_model(out, model)
    whole = read_fingerprint(convert(source, tmp_path / "whole"))
    assert whole["weights"] == read_fingerprint(out)["weights"]


def test_fingerprint_is_the_documented_hash_and_follows_the_weights(tmp_path: Path) -> None:
    out = convert(write_hf(random_llama(torch.float16), tmp_path / "a", "bin"), tmp_path / "out")
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors_of(out).items()):
        digest.update(f"{name} F16 {list(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    fingerprint = read_fingerprint(out)
    assert fingerprint["weights"] == digest.hexdigest()
    assert fingerprint["source"] == {"format": "huggingface", "name": "a"}
    assert str(tmp_path) not in (out / "fingerprint.json").read_text()
    on_disk = {p.name: p.stat().st_size for p in out.iterdir() if p.name != "fingerprint.json"}
    assert fingerprint["files"] == on_disk
    for name, tensor in tensors_of(out).items():
        content = f"{name} F16 {list(tensor.shape)}\n".encode() + tensor.numpy().tobytes()
        assert fingerprint["tensor_crc32"][name] == f"{zlib.crc32(content):08x}"
    small = [p for p in out.iterdir() if p.name in on_disk and p.suffix != ".safetensors"]
    assert fingerprint["file_sha256"] == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in small}
    check_content(out)
    other = read_fingerprint(convert(write_hf(random_llama(seed=1), tmp_path / "b"), tmp_path / "other"))
    assert other["weights"] != fingerprint["weights"]
    assert other["tokenizer"] == fingerprint["tokenizer"]
    (out / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: is missing; restore the file"):
        check_content(out)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_casts(tmp_path: Path, dtype: str) -> None:
    model = random_llama()
    out = convert(write_hf(model, tmp_path / "source"), tmp_path / "out", dtype=dtype)
    for name, tensor in tensors_of(out).items():
        assert torch.equal(tensor, model.state_dict()[name].to(getattr(torch, dtype)))


def test_expected_size_of_llama_7b() -> None:
    sizes = LlamaConfig(32_000, 32, 32, 32, 4096, 128, 11_008)
    assert sum(int(np.prod(shape)) for shape in base_shapes(sizes).values()) == 6_738_415_616


KILLED = """
import os, sys
from pathlib import Path
from lit_adapter.weights.convert import convert

def progress(done, total):
    if done > total // 2:
        os.kill(os.getpid(), int(sys.argv[3]))

convert(Path(sys.argv[1]), Path(sys.argv[2]), overwrite=True, progress=progress)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_leaves_no_output_and_the_next_run_sweeps(tmp_path: Path, kind: signal.Signals) -> None:
    model = random_llama()
    source, out = write_hf(model, tmp_path / "source"), tmp_path / "base" / "out"
    assert run_code(KILLED, source, out, int(kind)).returncode == -kind
    (leftover,) = out.parent.iterdir()
    assert leftover.name.startswith(".out.")
    convert(source, out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    before = read_fingerprint(out)
    assert run_code(KILLED, write_hf(random_llama(seed=1), tmp_path / "new"), out, int(kind)).returncode < 0
    assert read_fingerprint(out) == before
    assert_same_model(out, model)


@pytest.mark.parametrize("moment", ["made", "locked"])
def test_a_run_for_the_same_place_leaves_a_folder_that_is_only_just_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """It comes between making the folder and having its lock; what is old goes all the same."""
    out = tmp_path / "out"
    for name, content in ((".out.nolock.tmp", None), (".out.empty.tmp", b"")):
        old = tmp_path / name
        old.mkdir()
        if content is not None:
            (old / LOCK).write_bytes(content)
        os.utime(old, (0, 0))

    def make(**options: Any) -> str:
        name = mkdtemp(**options)
        sweep_leftovers(out)
        return name

    def lock(*arguments: Any) -> None:
        monkeypatch.undo()
        sweep_leftovers(out)
        flock(*arguments)

    mkdtemp, flock = tempfile.mkdtemp, fcntl.flock
    if moment == "made":
        monkeypatch.setattr(tempfile, "mkdtemp", make)
    else:
        monkeypatch.setattr(fcntl, "flock", lock)
    with scratch_folder(out) as scratch:
        assert list(tmp_path.iterdir()) == [scratch]
        sweep_leftovers(out)
        assert scratch.is_dir()


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    source = write_hf(random_llama(), tmp_path / "source")
    out = convert(source, tmp_path / "base" / "out")
    out.rename(out.parent / ".out.previous")
    with pytest.raises(Exception, match="already there"):
        convert(source, out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_overwrite_replaces_the_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = random_llama(seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(tensor_writer, "MAX_FILE_BYTES", 150_000)
        out = convert(write_hf(random_llama(), tmp_path / "a"), tmp_path / "out")
    assert (out / "model.safetensors.index.json").is_file()
    convert(write_hf(new, tmp_path / "b"), out, overwrite=True)
    assert [path.name for path in out.glob("model*")] == ["model.safetensors"]
    assert_same_model(out, new)


PEAK = """
import sys
from pathlib import Path
from lit_adapter.weights.convert import convert

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

small, large, out = map(Path, sys.argv[1:])
convert(small, out / "small")  # libraries are loaded and warm
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = status("VmRSS:")
convert(large, out / "large")
print(status("VmHWM:") - before)
"""


@pytest.fixture(scope="module")
def large_model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10}
    return random_llama(**sizes, num_attention_heads=8, num_key_value_heads=8)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure a peak")
@pytest.mark.parametrize("layout", ["single", "bin", "meta", "gguf"])
def test_peak_memory_stays_far_below_the_model(
    large_model: LlamaForCausalLM, tmp_path: Path, layout: str
) -> None:
    model, small = large_model, random_llama()
    writers = {"meta": write_meta, "gguf": lambda m, p: write_gguf(m, p)}
    writer = writers.get(layout, lambda m, p: write_hf(m, p, layout))
    for name, one in (("small", small), ("large", model)):
        writer(one, tmp_path / name)
    done = run_code(PEAK, tmp_path / "small", tmp_path / "large", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(f"{layout}: model {size:,} bytes, peak growth {int(done.stdout):,}")
    assert int(done.stdout) < size / 2
