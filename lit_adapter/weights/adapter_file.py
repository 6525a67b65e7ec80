"""``adapter.safetensors``: the trained tensors in fp32, with all that is needed to use them as metadata.

The safetensors header's metadata holds one key, ``lit_adapter``, with a JSON object: format version, form and
sizes of the adapter, prompt template and masking, the base's name, sizes and fingerprint, and a summary of
the training; on a base with head norms or windows also ``prefix``, how they treat it. The tensors of a prefix
are ``layers.{i}.self_attn.prefix.prompt [K, C]`` and ``.gate`` (raw, before c).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lit_adapter.errors import UserError, option
from lit_adapter.files.paths import is_unicode
from lit_adapter.files.read import reading
from lit_adapter.files.write import write_bytes
from lit_adapter.model.adapter import adapter_shapes, check_adapter_state
from lit_adapter.model.config import AdapterConfig, LlamaConfig, differences
from lit_adapter.model.lora_config import LoraConfig
from lit_adapter.model.prefix import treatment
from lit_adapter.text.template import Template
from lit_adapter.weights.base_folder import read_config, read_fingerprint
from lit_adapter.weights.base_search import find_base

METADATA_KEY = "lit_adapter"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class BaseIdentity:
    """Which base an adapter belongs to."""

    name: str
    """Folder name under ``checkpoints/``."""
    weights: str
    """SHA-256 over the base's tensors."""
    tokenizer: str
    """SHA-256 over its tokenizer files."""


def base_identity(folder: Path) -> BaseIdentity:
    """Return what identifies a converted base.

    Raises:
        UserError: not a converted base, or the folder's name is not UTF-8.
    """
    fingerprint, name = read_fingerprint(folder), folder.resolve().name
    if not is_unicode(name):
        raise UserError(f"{name!r}: the folder's name is not UTF-8; rename it")
    return BaseIdentity(name, fingerprint["weights"], fingerprint["tokenizer"])


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter file says about itself."""

    adapter: AdapterConfig
    base: BaseIdentity
    base_config: dict[str, Any]
    """The base's sizes, as its ``config.json`` spells them."""
    template: Template
    mask_prompt: bool = True
    training: dict[str, Any] = field(default_factory=dict)
    """Steps, records, losses and the like, for people; a resumed run reads the best adapter's ``steps``."""

    @property
    def model(self) -> LlamaConfig:
        """The base's sizes."""
        return LlamaConfig.from_hf(self.base_config, source="adapter metadata")


def save_adapter(
    path: Path, state: dict[str, torch.Tensor], info: AdapterInfo, *, make_folder: bool = True
) -> None:
    """Write an adapter, whole or not at all; with ``make_folder`` also its folder, if missing.

    Raises:
        UserError: tensors that do not fit ``info`` or are not finite, or a file that cannot be written.
    """
    check_adapter_state(adapter_shapes(info.adapter, info.model), state, str(path))
    described = {"format_version": FORMAT_VERSION, **asdict(info)}
    described["adapter"]["norms"] = "norms" in info.adapter.parts  # explicit, as defaults may change
    if treated := _treatment(info):
        described["prefix"] = treated
    tensors = {name: state[name].detach().float().cpu().contiguous() for name in sorted(state)}
    write_bytes(
        path,
        save(tensors, metadata={METADATA_KEY: json.dumps(described, sort_keys=True)}),
        make_folder=make_folder,
    )


def read_adapter(path: Path) -> tuple[AdapterInfo, dict[str, torch.Tensor]]:
    """Read and check an adapter file.

    Raises:
        UserError: missing, damaged, from another program, or tensors that its metadata does not describe.
    """
    with reading(path):
        if not path.is_file():
            raise _missing(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = (file.metadata() or {}).get(METADATA_KEY)
            if metadata is None:
                raise UserError(
                    f"{path}: not an adapter written by lit_adapter (no '{METADATA_KEY}' metadata)"
                )
            info, shapes = _parse(metadata, path)
            _check_header(file, shapes, path)
            state = {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error})") from None
    check_adapter_state(shapes, state, str(path))
    return info, state


def base_of(adapter: Path) -> Path:
    """Return the folder of the base that an adapter's file names.

    Raises:
        UserError: as `read_adapter` and `find_base`.
    """
    return find_base(read_adapter(adapter)[0].base, adapter)


def _treatment(info: AdapterInfo) -> dict[str, str]:
    return treatment(info.model) if info.adapter.prompt_length else {}


def _missing(path: Path) -> UserError:
    """Say what is there instead of an adapter's file: a folder, or a run that has not reached its end."""
    run = path if path.is_dir() else path.parent
    files = [run / name for name in ("adapter.safetensors", "best.safetensors") if (run / name).is_file()]
    instead = f"; {' and '.join(map(str, files))} {'is' if len(files) == 1 else 'are'} there" if files else ""
    if path.is_dir():
        return UserError(f"{path}: is a folder; name the adapter's file{instead}")
    if any(run.glob("checkpoints/step-*.ckpt")) and path.name == "adapter.safetensors":
        end = "which writes this file at its end; continue it with --resume last"
        return UserError(f"{path}: not there: {run} holds an unfinished run, {end}{instead}")
    return UserError(f"{path}: no such adapter file; training writes RUN_FOLDER/adapter.safetensors{instead}")


def _check_header(file: Any, shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """Compare names, shapes and types with the metadata before any tensor is read."""
    odd = set(file.keys()) ^ shapes.keys()
    if odd:
        raise UserError(f"{path}: tensors and metadata disagree, first at {min(odd)}")
    for name, shape in shapes.items():
        entry = file.get_slice(name)
        given = entry.get_shape()
        if tuple(given) != shape:
            raise UserError(f"{path}: {name} has shape {list(given)}; its metadata says {list(shape)}")
        if entry.get_dtype() != "F32":
            raise UserError(f"{path}: {name} is {entry.get_dtype()}; an adapter is kept in F32")


def _parse(metadata: str, path: Path) -> tuple[AdapterInfo, dict[str, tuple[int, ...]]]:
    try:
        raw = json.loads(metadata)
        if raw["format_version"] != FORMAT_VERSION:
            raise UserError(f"adapter format {raw['format_version']}; this version reads {FORMAT_VERSION}")
        _check_types(raw)
        info = AdapterInfo(
            adapter=_adapter_config(raw["adapter"]),
            base=BaseIdentity(**raw["base"]),
            base_config=raw["base_config"],
            template=Template.from_dict(raw["template"]),
            mask_prompt=raw["mask_prompt"],
            training=raw["training"],
        )
        if raw.get("prefix", _treatment(info)) != _treatment(info):
            raise UserError(
                f"its metadata says that prefixes {raw['prefix']!r:.120}; expected {_treatment(info)}"
            )
        return info, adapter_shapes(info.adapter, info.model)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: the adapter's metadata is damaged ({error})") from None


def _adapter_config(values: dict[str, Any]) -> AdapterConfig:
    """Return a configuration without the parts that the version that wrote the file did not have."""
    return AdapterConfig(**{"norms": False, **values, "lora": LoraConfig(**values.get("lora", {}))})


def _check_types(raw: Any) -> None:
    """Refuse, by ValueError, metadata whose values have other types than `save_adapter` writes."""
    whole = {"base_config": dict, "mask_prompt": bool, "training": dict}
    adapter, base = get_type_hints(AdapterConfig), get_type_hints(BaseIdentity)
    given = raw["adapter"]
    lora = given.get("lora", {}) if isinstance(given, dict) else {}
    sections = (
        ("adapter", adapter | {"lora": dict}, given),
        ("adapter.lora", get_type_hints(LoraConfig), lora),
        ("base", base, raw["base"]),
        ("", whole, raw),
    )
    for part, kinds, values in sections:
        if not isinstance(values, dict):
            raise ValueError(f"{part} is {values!r:.60}; expected an object")
        for key, kind in kinds.items():
            if part.startswith("adapter") and key not in values:
                continue  # the version that wrote the file did not have it
            if not _is_a(values[key], kind):
                expected = kind.__name__ if isinstance(kind, type) else kind
                raise ValueError(f"{part}{part and '.'}{key} is {values[key]!r:.60}; expected {expected}")
    name = raw["base"]["name"]
    if name in ("", ".", "..") or Path(name).name != name or "\0" in name or not is_unicode(name):
        raise ValueError(f"base.name is {name!r:.60}; expected a plain folder name")


def _is_a(value: object, kind: Any) -> bool:
    """Whether a value from JSON is of a dataclass field's type."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(_is_a(item, get_args(kind)[0]) for item in value)
    kinds = get_args(kind) or (kind,)
    if isinstance(value, bool) or bool in kinds:
        return isinstance(value, bool) and bool in kinds
    return isinstance(value, (*kinds, int) if float in kinds else kinds)


def check_base(info: AdapterInfo, folder: Path, path: Path) -> None:
    """Refuse the adapter at ``path`` on a base other than the one it was trained on.

    Raises:
        UserError: ``folder`` is not a base, or another one, with both names.
    """
    base = base_identity(folder)
    if info.base.weights != base.weights:
        raise UserError(
            f"{path}: trained on base '{info.base.name}' ({info.base.weights[:12]}), "
            f"not on '{base.name}' ({base.weights[:12]}); give its own base with {option('base')}"
        )
    if info.base.tokenizer != base.tokenizer:
        raise UserError(
            f"{path}: base '{base.name}' has the right weights but another tokenizer "
            f"({base.tokenizer[:12]} instead of {info.base.tokenizer[:12]}); convert the base again"
        )
    others = differences(info.model, read_config(folder))
    if others:
        raise UserError(
            f"{path}: base '{base.name}' has the right weights but another config.json "
            f"({', '.join(others)}); convert the base again"
        )
