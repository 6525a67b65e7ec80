"""Faults 35 to 50: checkpoints to convert, converted bases, adapters, tokenizers."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from bench import Bench, Outcome, Row
from convert_sources import SIZES, write_gguf
from generation_fixtures import save_random_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lit_adapter
from lit_adapter.weights.adapter_file import METADATA_KEY

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def source(change: Callable[[Path], object]) -> Callable[[Bench], Outcome]:
    """Change a Hugging Face folder, then convert it."""

    def tried(bench: Bench) -> Outcome:
        folder = bench.copy_source()
        change(folder)
        return bench.convert(folder)

    return tried


YARN = {"rope_type": "yarn", "factor": "four"}
WINDOWS = {"use_sliding_window": True, "sliding_window": 8}


def family(kind: str, **values: Any) -> Callable[[Path], object]:
    """Make a folder one of another family."""
    return lambda folder: edit(folder / "config.json", model_type=kind, **values)


def mixed(folder: Path) -> None:
    """Weights of a LLaMA under the configuration of a Qwen2."""
    edit(folder / "config.json", model_type="qwen2")


def wide_norm(folder: Path) -> None:
    edit(folder / "config.json", model_type="qwen3")
    layers = range(json.loads((folder / "config.json").read_text())["num_hidden_layers"])
    names = [f"model.layers.{layer}.self_attn.{part}_norm.weight" for layer in layers for part in "qk"]
    save_file(load_file(folder / WEIGHTS) | {name: torch.ones(7) for name in names}, folder / WEIGHTS)


def weights(content: bytes) -> Callable[[Bench], Outcome]:
    return source(lambda folder: (folder / WEIGHTS).write_bytes(content))


def header(entries: dict[str, Any] | str, size: int = 0) -> Callable[[Bench], Outcome]:
    """A safetensors file of this header and so many zeros."""
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    return weights(struct.pack("<Q", len(text)) + text + bytes(size))


def entry(
    dtype: str = "F32", shape: tuple[int, ...] = (2,), offsets: tuple[int, int] = (0, 8)
) -> dict[str, Any]:
    return {"model.norm.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add, or with None remove tensors; the file's metadata stays."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = {**load_file(path), **{name.replace("__", "."): value for name, value in changes.items()}}
    save_file({name: value for name, value in state.items() if value is not None}, path, metadata=metadata)


def overwrite(path: Path, **changes: torch.Tensor) -> None:
    """Overwrite tensors in place: the file keeps its size."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    described = json.loads(content[8 : 8 + length])
    for name, value in changes.items():
        begin, end = described[name.replace("__", ".")]["data_offsets"]
        content[8 + length + begin : 8 + length + end] = value.numpy().tobytes()
    path.write_bytes(content)


def beyond_fp32(folder: Path) -> None:
    edit_tensors(folder / WEIGHTS, model__norm__weight=torch.full((48,), 3e38))


def split(folder: Path, *, index: dict[str, str] | None = None, twice: bool = False) -> None:
    """Cut the weights into two shards with an index."""
    state = load_file(folder / WEIGHTS)
    names = sorted(state)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[4 if twice else 5 :]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | (index or {})}))


def shard_named(name: str) -> Callable[[Bench], Outcome]:
    return source(lambda folder: split(folder, index={"model.norm.weight": name}))


def missing_shard(folder: Path) -> None:
    split(folder)
    (folder / "b.safetensors").unlink()


def link_out(folder: Path) -> None:
    split(folder)
    (folder / "b.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "b.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


def adapter(change: Callable[[Path], object], **metadata: Any) -> Callable[[Bench], Outcome]:
    """Change an adapter file, or what it says of itself, then generate with it."""

    def tried(bench: Bench) -> Outcome:
        path = bench.file("adapter.safetensors", bench.adapter.read_bytes())
        if metadata:
            with safe_open(path, framework="pt") as file:
                described = json.loads(file.metadata()[METADATA_KEY])
            described |= {
                key: described.get(key, {}) | value if isinstance(value, dict) else value
                for key, value in metadata.items()
            }
            save_file(load_file(path), path, metadata={METADATA_KEY: json.dumps(described)})
        change(path)
        return bench.generate("--adapter", path)

    return tried


def kept(path: Path) -> None:
    """Change nothing more."""


def base(change: Callable[[Path], object]) -> Callable[[Bench], Outcome]:
    """Change a converted base, then train on it."""

    def tried(bench: Bench) -> Outcome:
        folder = bench.copy_base("base")
        change(folder)
        return bench.finetune(base=folder)

    return tried


def other_base(bench: Bench) -> Outcome:
    """An adapter of a base whose sizes are right."""
    other = bench.copy_base("other")
    edit(other / "fingerprint.json", weights="0" * 64)
    return bench.generate("--base", other)


def other_numbers(bench: Bench) -> Outcome:
    """An adapter of a base whose weights are right, under another configuration."""
    other = bench.copy_base("other")
    edit(other / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    return bench.generate("--base", other)


def other_sizes(bench: Bench) -> Outcome:
    """An adapter whose metadata is this base's, but whose tensors are narrower."""
    path = save_random_adapter(bench.base, bench.folder / "adapter.safetensors")
    state = {
        name: tensor[..., :-1] if "prompt" in name else tensor for name, tensor in load_file(path).items()
    }
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata=metadata)
    return bench.generate("--adapter", path)


def bombed_source(name: str, **environment: str) -> Callable[[Bench], Outcome]:
    def tried(bench: Bench) -> Outcome:
        folder = bench.copy_source()
        (folder / WEIGHTS).unlink()
        bench.bomb("bomb.bin").rename(folder / name)
        if name.startswith("consolidated"):
            (folder / "config.json").unlink()
            bench.file("source/params.json", {"dim": 48, "n_layers": 4, "n_heads": 4, "norm_eps": 1e-5})
        if environment:
            return bench.process("convert.py", folder, "--out", bench.folder / "converted", **environment)
        return bench.convert(folder)

    return tried


def larger_than_its_file(bench: Bench) -> Outcome:
    """A tensor of 2 GB in a file of one number: a view that repeats it."""
    folder = bench.copy_source()
    state = load_file(folder / WEIGHTS) | {"model.norm.weight": torch.zeros(1).expand(5 * 10**8)}
    (folder / WEIGHTS).unlink()
    torch.save(state, folder / "pytorch_model.bin")
    return bench.convert(folder)


def bombed_adapter(bench: Bench) -> Outcome:
    return bench.generate("--adapter", bench.bomb("adapter.pth"))


def bombed_checkpoint(bench: Bench) -> Outcome:
    run = bench.copy_finished_run()
    bench.bomb("bomb.ckpt").replace(run / "checkpoints" / "step-0000009.ckpt")
    return bench.finetune("--resume", run / "checkpoints" / "step-0000009.ckpt", "--optim.max_steps", 9)


def junk_gguf(bench: Bench) -> Outcome:
    return bench.convert(bench.file("model.gguf", b"GGUF" + bytes(4)))


def other_gguf(bench: Bench) -> Outcome:
    path = bench.folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return bench.convert(path)


def unknown_tokenizer(bench: Bench) -> Outcome:
    config = transformers.Qwen2Config(**{**SIZES, "num_hidden_layers": 1})
    write_gguf(
        transformers.Qwen2ForCausalLM(config), bench.folder / "model.gguf", architecture="qwen2", pre="qwen9"
    )
    return bench.convert(bench.folder / "model.gguf")


def half_precision(bench: Bench) -> str:
    """fp16 on a CPU: slow, but it answers."""
    model = lit_adapter.load(bench.adapter, bench.base, device="cpu", dtype="float16")
    return f"answered: {isinstance(model.generate('Say it back.', max_new_tokens=3), str)}"


def v2_adapter(bench: Bench) -> Outcome:
    """A format that this version does not know."""
    return adapter(kept, format_version=99)(bench)


NAN = torch.full((48,), torch.nan)
GATE = "layers.3.self_attn.prefix.gate"
ROWS = [
    Row(35, "missing shard", source(missing_shard), r"b\.safetensors: file not found \(listed in model.safe"),
    Row(
        36,
        "truncated weights",
        source(lambda f: truncate(f / WEIGHTS)),
        r"model\.safetensors: truncated .*fetch",
    ),
    Row(
        36,
        "truncated base",
        base(lambda f: truncate(f / WEIGHTS)),
        r"model\.safetensors.*convert the base again",
    ),
    Row(
        36, "truncated adapter", adapter(truncate), r"adapter\.safetensors: damaged or not a safetensors file"
    ),
    Row(
        37,
        "LFS pointer",
        weights(b"version https://git-lfs.github.com/spec/v1\n"),
        r"Git LFS pointer.*git lfs",
    ),
    Row(37, "web page", weights(b"<!DOCTYPE html><html>"), r"model\.safetensors: is a web page"),
    Row(38, "empty file", weights(b""), r"model\.safetensors: the file is empty; fetch it again"),
    Row(
        38, "huge header", weights(struct.pack("<Q", 2**40) + b"{}"), r"truncated or damaged .*fetch it again"
    ),
    Row(38, "offset out of range", header(entry(offsets=(0, 800)), 8), r"truncated or damaged"),
    Row(38, "unknown type", header(entry("F31"), 8), r"truncated or damaged"),
    Row(38, "shape overflow", header(entry(shape=(2**40, 2**40)), 8), r"truncated or damaged"),
    Row(
        38,
        "overlap",
        header(entry() | {"lm_head.weight": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, 12),
        r"truncated or damaged",
    ),
    Row(
        38,
        "tensor twice in the header",
        header(
            '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
            '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            8,
        ),
        r"model\.safetensors: ('a' appears twice|truncated)",
    ),
    Row(38, "tensor larger than its file", larger_than_its_file, r"is declared larger than the file's data"),
    Row(39, "shard above the folder", shard_named("../b.safetensors"), r"'../b.safetensors' leads out of"),
    Row(
        39,
        "absolute shard",
        shard_named("/etc/passwd"),
        r"'/etc/passwd' leads out of the folder; expected a pl",
    ),
    Row(
        39,
        "shard by URL",
        shard_named("https://x/y.safetensors"),
        r"leads out of the folder; expected a plain",
    ),
    Row(39, "link out of the folder", source(link_out), r"b\.safetensors: is a link that leads out of"),
    Row(
        40,
        "tensor not in its shard",
        shard_named("a.safetensors"),
        r"a\.safetensors: tensor model.norm.weight is",
    ),
    Row(
        40,
        "tensor in two shards",
        source(lambda f: split(f, twice=True)),
        r"b\.safetensors: tensor .* also in a",
    ),
    Row(
        40,
        "unknown tensor",
        source(lambda f: edit_tensors(f / WEIGHTS, extra__weight=torch.ones(2))),
        r"tensor extra.weight is unknown in a llama model",
    ),
    Row(
        40,
        "missing tensor",
        source(lambda f: edit_tensors(f / WEIGHTS, model__norm__weight=None)),
        r"tensor model.norm.weight is missing",
    ),
    Row(
        40,
        "missing tensor of a base",
        base(lambda f: edit_tensors(f / WEIGHTS, model__norm__weight=None)),
        r"model\.safetensors: has \d+ bytes instead of \d+; restore the file, or convert the base again$",
    ),
    Row(41, "other sizes", other_sizes, r"prompt has shape \[5, 47\]; its metadata says \[5, 48\]"),
    Row(
        41,
        "other prompt length",
        adapter(kept, adapter={"prompt_length": 6}),
        r"prompt has shape \[5, 48\]; its metadata says \[6, 48\]",
    ),
    Row(
        41,
        "sizes beyond all bounds",
        adapter(kept, base_config={"num_hidden_layers": 10**12}),
        r"adapter\.safetensors: ",
    ),
    Row(
        42,
        "right weights, other numbers",
        other_numbers,
        r"another config.json \(rope.theta 1\S+ and 500.0\)",
    ),
    Row(42, "right sizes, other base", other_base, r"trained on base 'tiny' .*not on 'other' .*with --base"),
    Row(43, "format of another version", v2_adapter, r"adapter format 99; this version reads"),
    Row(
        43,
        "v1 adapter into a v2 run",
        lambda b: b.finetune("--init_from", b.adapter, "--adapter.version", "v2"),
        r"adapter\.safetensors: .*version",
    ),
    Row(
        44,
        "nan in a source",
        source(lambda f: edit_tensors(f / WEIGHTS, model__norm__weight=NAN)),
        r"tensor model.norm.weight holds NaN or infinite values",
    ),
    Row(
        44,
        "nan in an adapter",
        adapter(lambda path: edit_tensors(path, **{GATE: NAN[:4]})),
        r"adapter\.safetensors: layers.3.self_attn.prefix.gate holds values that are not finite",
    ),
    Row(
        44,
        "nan in a base",
        base(lambda f: overwrite(f / WEIGHTS, model__norm__weight=NAN)),
        r"model\.safetensors: tensor model\.norm\.weight has changed since the base was converted; restore",
    ),
    Row(
        44,
        "weights beyond fp32",
        lambda b: b.finetune(base=b.new_base(beyond_fp32)),
        r"tiny\.json:\d+: the loss on this record is nan",
    ),
    Row(45, "bomb of weights", bombed_source("pytorch_model.bin"), r"pytorch_model\.bin: .*could run code"),
    Row(45, "bomb of Meta", bombed_source("consolidated.00.pth"), r"consolidated\.00\.pth: .*could run code"),
    Row(
        45,
        "bomb with pickle forced",
        bombed_source("pytorch_model.bin", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1"),
        r"pytorch_model\.bin: .*could run code",
        slow=True,
    ),
    Row(45, "bomb of a checkpoint", bombed_checkpoint, r"step-0000009\.ckpt: not a usable checkpoint"),
    Row(46, "bomb of an adapter", bombed_adapter, r"adapter\.pth: "),
    Row(
        47,
        "no tokenizer",
        source(lambda f: (f / "tokenizer.json").unlink()),
        r"no tokenizer; expected tokenizer",
    ),
    Row(
        47,
        "junk tokenizer",
        source(lambda f: (f / "tokenizer.json").write_bytes(b"\0junk")),
        r"tokenizer\.json",
    ),
    Row(
        47,
        "junk tokenizer of a base",
        base(lambda f: (f / "tokenizer.json").write_bytes(b"{}")),
        r"tokenizer\.js",
    ),
    Row(
        47,
        "more ids than rows",
        base(lambda f: edit(f / "config.json", vocab_size=50)),
        r"the tokenizer has \d+ ids, but the embedding has 50 rows",
    ),
    Row(
        48, "EOS beyond the vocabulary", source(lambda f: edit(f / "config.json", eos_token_id=9999)), r"9999"
    ),
    Row(
        49,
        "unknown rope",
        source(lambda f: edit(f / "config.json", rope_parameters={"rope_type": "longrope"})),
        r"'longrope'",
    ),
    Row(
        49, "odd heads", source(lambda f: edit(f / "config.json", num_attention_heads=7, head_dim=None)), r"7"
    ),
    Row(
        49,
        "other model",
        source(lambda f: edit(f / "config.json", model_type="gpt2")),
        r"model_type is 'gpt2'",
    ),
    Row(
        49,
        "text as a size",
        source(lambda f: edit(f / "config.json", hidden_size="48")),
        r"hidden_size|n_embd",
    ),
    *(
        Row(49, what, source(family(kind, **values)), message)
        for what, kind, values, message in (
            (
                "window of 0",
                "mistral",
                {"sliding_window": 0},
                r"config\.json.*the window is 0; expected .* from 1",
            ),
            (
                "window beyond the context",
                "mistral",
                {"sliding_window": 10**6},
                r"the window is 1000000; .* to the",
            ),
            (
                "windows above all layers",
                "qwen2",
                WINDOWS | {"max_window_layers": 99},
                r"max_window_layers is 99",
            ),
            ("unknown kind of layer", "qwen3", WINDOWS | {"layer_types": ["chunked"]}, r"layer_types is"),
            ("too few marks", "smollm3", {"no_rope_layers": [1]}, r"no_rope_layers is \[1\]"),
            (
                "yarn factor in words",
                "qwen2",
                {"rope_parameters": YARN},
                r"rope factor is 'four'; expected a number",
            ),
            ("experts", "qwen3", {"num_experts": 8}, r"num_experts is 8: a mixture of experts"),
            (
                "a near relative",
                "gemma2",
                {},
                r"is 'gemma2', which has norms that .*; expected llama, mistral",
            ),
        )
    ),
    Row(
        40,
        "tensors of another family",
        source(mixed),
        r"model\.safetensors: .*q_proj\.bias.*(missing|unknown)",
    ),
    Row(40, "norms of heads of another size", source(wide_norm), r"q_norm\.weight has shape \[7\]"),
    Row(
        47,
        "GGUF of an unknown tokenizer",
        unknown_tokenizer,
        r"'tokenizer\.ggml\.pre' is 'qwen9', which is unknown",
    ),
    Row(50, "fp16 on a CPU", lambda b: b.call(half_precision, b), r"^answered: True$", 0),
    Row(50, "damaged GGUF", junk_gguf, r"model\.gguf: truncated or damaged"),
    Row(
        50,
        "GGUF of another model",
        other_gguf,
        r"is 'mamba'; expected llama, qwen2, qwen3 or smollm3",
    ),
]
