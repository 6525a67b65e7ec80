"""A base merged with an adapter, as a GGUF file that llama.cpp runs, and an Ollama Modelfile beside it.

Matrices are quantised by the gguf package, vectors stay fp32. With types below 8 bits, the embedding and the
output layer are Q8_0: there the loss would be largest. llama.cpp computes no windows in these architectures,
so the context in the file is no longer than the window.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from lit_adapter.errors import UserError
from lit_adapter.files.write import durable_path, write_text
from lit_adapter.model.config import LlamaConfig
from lit_adapter.model.layout import base_shapes
from lit_adapter.model.rope import inverse_frequencies
from lit_adapter.model.rope_config import RopeConfig, yarn_scale
from lit_adapter.progress import Progress
from lit_adapter.text.chat_export import chat_template, ollama_template
from lit_adapter.text.gguf_export import gguf_tokenizer
from lit_adapter.text.load import load_tokenizer
from lit_adapter.weights.export.adapted import Adapted
from lit_adapter.weights.gguf_config import META_ROWS, ROPE_TABLE, architecture_of
from lit_adapter.weights.gguf_file import MODULES, GGUFSource
from lit_adapter.weights.measure import compared, fixed_prompt, source_logits
from lit_adapter.weights.output_folder import check_free, check_output, move_into_place, scratch_folder
from lit_adapter.weights.source import half_split, renamed

MODELFILE = "Modelfile"
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q5_1": gguf.LlamaFileType.MOSTLY_Q5_1,
    "q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
    "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
"""llama.cpp's number for a file of each type."""
Kind: Any = gguf.GGMLQuantizationType


def export_gguf(
    adapted: Adapted, out: Path, kind: str, *, overwrite: bool = False, progress: Progress = None
) -> list[str]:
    """Write ``out/NAME-TYPE.gguf`` and ``out/Modelfile``, and return what to tell the user.

    Raises:
        UserError: a model or a tokenizer that llama.cpp does not support, an output that must not be
            replaced, or a full disk.
    """
    for source in (adapted.path, adapted.base):
        check_output(out, source, overwrite=overwrite, mark=MODELFILE, what="a GGUF export")
    template, tokenizer = adapted.info.template, load_tokenizer(adapted.base)
    name = f"{out.name}-{kind.upper()}.gguf"
    with scratch_folder(out) as scratch:
        with durable_path(scratch / name) as temporary:
            _write(adapted, temporary, out, kind, progress)
        stop = tokenizer.spelling(template.end_id(tokenizer))
        lines = [f"FROM ./{name}", f'TEMPLATE """{ollama_template(template, tokenizer)}"""']
        lines += [f'PARAMETER stop "{stop}"'] if stop else []
        write_text(scratch / MODELFILE, "\n".join([*lines, "PARAMETER temperature 0"]) + "\n")
        measured = _compare(adapted, scratch / name)
        move_into_place(scratch, out)
    made = f"ollama create {out.name} -f {out / MODELFILE} makes it known to Ollama"
    return [*_notes(adapted), measured, made]


def _notes(adapted: Adapted) -> list[str]:
    """Say how the file differs from the adapter's base."""
    config, notes = adapted.merged().config, []
    own, base = (architecture_of(one, adapted.path) for one in (config, adapted.info.model))
    if own != base:
        notes.append(f"written as {own}, which has all of V2's biases")
    if _context(config) < config.context_length:
        notes.append(f"for texts of up to {_context(config)} tokens, as llama.cpp has no windows here")
    return notes


def _context(config: LlamaConfig) -> int:
    """Return how many tokens a text may have to be computed without windows."""
    window = config.window if config.windowed_layers else None
    return min(config.context_length, window or config.context_length)


def _write(adapted: Adapted, path: Path, out: Path, kind: str, progress: Progress) -> None:
    source, template = adapted.merged(), adapted.info.template
    config = source.config
    architecture = architecture_of(config, adapted.path)
    writer: Any = gguf.GGUFWriter(path, architecture)
    _add_sizes(writer, config, out.name, kind)
    for key, value in gguf_tokenizer(adapted.base, template, config.vocab_size).items():
        _add(writer, f"tokenizer.ggml.{key}", value)
    writer.add_chat_template(chat_template(template, load_tokenizer(adapted.base)))
    names, shapes = renamed(config, MODULES, "blk"), base_shapes(config)
    kinds = {name: _kind(name, shape, kind) for name, shape in shapes.items()}
    n_bytes = {name: _n_bytes(shape, kinds[name]) for name, shape in shapes.items()}
    table = _rope_table(config)
    if table is not None:
        writer.add_tensor_info(ROPE_TABLE, table.shape, table.dtype, table.nbytes, Kind.F32)
    for name, shape in shapes.items():
        writer.add_tensor_info(names[name], shape, np.float32, n_bytes[name], kinds[name])
    n_total = sum(n_bytes.values())
    check_free(out, n_total)
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if table is not None:
            writer.write_tensor_data(table)
        n_done = 0
        for name in shapes:
            rows = source.tensor(name)
            if architecture in META_ROWS:
                rows = half_split(name, rows, config, undo=True)
            with np.errstate(over="ignore"):  # overflow becomes infinity, which is checked below
                packed = gguf.quants.quantize(rows.float().contiguous().numpy(), kinds[name])
            _check_range(packed, source.label(name), kind)
            writer.write_tensor_data(packed)
            n_done += packed.nbytes
            if progress is not None:
                progress(n_done, n_total)


def _add(writer: Any, key: str, value: Any) -> None:
    """Write a key of the tokenizer with the type that llama.cpp expects."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _add_sizes(writer: Any, config: LlamaConfig, name: str, kind: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_hidden)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    _add_rope(writer, config.rope)


def _add_rope(writer: Any, rope: RopeConfig) -> None:
    writer.add_rope_freq_base(rope.theta)
    if rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope.kind))
        writer.add_rope_scaling_factor(rope.factor)
    if rope.kind in ("llama3", "yarn"):
        writer.add_rope_scaling_orig_ctx_len(rope.original_context_length)
    if rope.kind == "yarn":
        writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)
        # llama.cpp multiplies this by yarn's own scale.
        writer.add_rope_scaling_attn_factors(rope.attention_factor / yarn_scale(rope.factor))


def _rope_table(config: LlamaConfig) -> Any:
    """Return the factors by which LLaMA 3's scaling divides the frequencies, fp32 ``[head_dim / 2]``."""
    if config.rope.kind != "llama3":
        return None
    plain = 1.0 / config.rope.theta ** (torch.arange(0, config.head_dim, 2).double() / config.head_dim)
    scaled = inverse_frequencies(config.rope, config.head_dim)
    return (plain / scaled).float().numpy()


def _kind(name: str, shape: tuple[int, ...], kind: str) -> Any:
    if len(shape) == 1:
        return Kind.F32
    ends = name in ("model.embed_tokens.weight", "lm_head.weight")
    wanted = Kind.Q8_0 if ends and kind.startswith(("q4", "q5")) else Kind[kind.upper()]
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if shape[-1] % block == 0 else Kind.F16


def _n_bytes(shape: tuple[int, ...], kind: Any) -> int:
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * n_bytes


def _check_range(packed: np.ndarray, label: str, kind: str) -> None:
    if packed.dtype.kind == "f" and not np.isfinite(packed).all():
        raise UserError(f"{label} holds values beyond the range of {kind}; use --type bf16 or f32")


def _compare(adapted: Adapted, path: Path) -> str:
    """Say how far the logits of what the file holds are from the adapter's, and how often they agree."""
    ids = fixed_prompt(adapted.base)[:, : _context(adapted.info.model)]
    wanted, found = adapted.logits(ids), source_logits(GGUFSource(path), ids)
    same = int((found.argmax(-1) == wanted.argmax(-1)).sum())
    return compared(wanted, found, "file", f", of which {same} have the same next token")
