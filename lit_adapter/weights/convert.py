"""Turn a checkpoint of any known format into a base folder, tensor by tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lit_adapter.device import DTYPES
from lit_adapter.errors import UserError, WriteError
from lit_adapter.files.write import write_json
from lit_adapter.model.layout import base_shapes
from lit_adapter.progress import Progress
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.tokenizer import check_vocabulary
from lit_adapter.weights.base_content import small_file_digests
from lit_adapter.weights.base_folder import (
    CONFIG,
    FINGERPRINT,
    FORMAT_VERSION,
    GENERATION_CONFIG,
    tokenizer_fingerprint,
)
from lit_adapter.weights.gguf_file import GGUFSource
from lit_adapter.weights.huggingface import HuggingFaceSource
from lit_adapter.weights.meta import PARAMS, MetaSource
from lit_adapter.weights.output_folder import (
    check_free,
    check_output,
    move_into_place,
    scratch_folder,
    sweep_leftovers,
)
from lit_adapter.weights.source import Source
from lit_adapter.weights.tensor_writer import Entry, write_tensors


def convert(
    source: Path,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    origin: dict[str, Any] | None = None,
    progress: Progress = None,
) -> Path:
    """Convert a checkpoint, into a base folder that appears whole or not at all, and return ``out``.

    The source is a Hugging Face folder, a Meta folder, or a GGUF file. ``dtype`` is float32, bfloat16 or
    float16; by default every tensor keeps the source's type, and quantised GGUF types become float32, which
    holds their values exactly. ``overwrite`` replaces a converted base that is already there, once the new
    one is complete. ``origin`` is what the fingerprint says about the source, by default its format and file
    name.

    Raises:
        UserError: a damaged or unknown source, an output that must not be replaced, or a full disk.
    """
    out = out.absolute()
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    sweep_leftovers(out)
    check_output(out, source, overwrite=overwrite)
    with _naming(source):
        checkpoint = _open_source(source)
    origin = origin or {"format": checkpoint.format, "name": source.resolve().name}
    write_base(checkpoint, source, out, dtype, origin, progress)
    return out


def write_base(
    checkpoint: Source,
    source: Path,
    out: Path,
    dtype: str | None,
    origin: dict[str, Any],
    progress: Progress = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write an opened checkpoint as a base folder; ``source`` is its name in messages.

    ``check`` is called with the complete folder before it is moved into place.

    Raises:
        UserError: a tensor or tokenizer that cannot be used, or a full disk.
    """
    entries = [
        Entry(name, shape, checkpoint.dtypes[name] if dtype is None else DTYPES[dtype])
        for name, shape in base_shapes(checkpoint.config).items()
    ]
    with scratch_folder(out) as scratch:
        with _naming(source, scratch):
            checkpoint.write_tokenizer(scratch)
            check_vocabulary(load_tokenizer(scratch), checkpoint.config.vocab_size)
        check_free(out, sum(entry.n_bytes for entry in entries))
        weights, tensor_crc32 = write_tensors(scratch, entries, checkpoint.tensor, checkpoint.label, progress)
        _write_config(checkpoint, entries, scratch)
        files = [path for path in sorted(scratch.iterdir()) if not path.name.startswith(".")]
        fingerprint = {
            "format": FORMAT_VERSION,
            "weights": weights,
            "tokenizer": tokenizer_fingerprint(scratch),
            "files": {path.name: path.stat().st_size for path in files},
            "file_sha256": small_file_digests(scratch),
            "tensor_crc32": tensor_crc32,
            "source": origin,
        }
        write_json(scratch / FINGERPRINT, fingerprint)
        if check is not None:
            check(scratch)
        move_into_place(scratch, out)


def _write_config(checkpoint: Source, entries: list[Entry], folder: Path) -> None:
    """Write ``config.json``, which names the type of most of the weights, and what is known of generation."""
    sizes: Counter[torch.dtype] = Counter()
    for entry in entries:
        sizes[entry.dtype] += entry.n_bytes
    main = str(sizes.most_common(1)[0][0]).removeprefix("torch.")
    write_json(folder / CONFIG, {**checkpoint.config.to_hf(), **checkpoint.token_ids, "dtype": main})
    if checkpoint.generation is not None:
        write_json(folder / GENERATION_CONFIG, checkpoint.generation)


def _open_source(source: Path) -> Source:
    """Recognise a checkpoint and check everything about it except the values of its tensors."""
    if source.is_file():
        if source.suffix in (".safetensors", ".bin", ".pth", ".pt"):
            raise UserError(f"{source}: give the folder that holds it, with its {CONFIG} or {PARAMS}")
        return GGUFSource(source)
    if not source.is_dir():
        raise UserError(f"{source}: no such file or folder")
    if (source / CONFIG).is_file():
        return HuggingFaceSource(source)
    if (source / PARAMS).is_file():
        return MetaSource(source)
    found = sorted(path.name for path in source.glob("*.gguf"))
    hint = f"; did you mean {source / found[0]}?" if found else ""
    raise UserError(f"{source}: no {CONFIG} (Hugging Face) or {PARAMS} (Meta) there{hint}")


@contextmanager
def _naming(source: Path, copy: Path | None = None) -> Iterator[None]:
    """Make error messages name the source, and never the unfinished copy, which is deleted by then."""
    try:
        yield
    except WriteError:
        raise
    except UserError as error:
        message = str(error) if copy is None else str(error).replace(str(copy), str(source))
        raise UserError(message if str(source) in message else f"{source}: {message}") from None
