"""Convert an adapter from one format into another, and report what was exact and what was not."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from lit_adapter.errors import UserError
from lit_adapter.files.paths import refuse_input
from lit_adapter.files.read import reading
from lit_adapter.files.write import write_bytes, write_json
from lit_adapter.model.config import LlamaConfig
from lit_adapter.model.gates import GateName
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import resolve_template
from lit_adapter.weights.adapter_file import (
    AdapterInfo,
    base_identity,
    check_base,
    read_adapter,
    save_adapter,
)
from lit_adapter.weights.base_folder import base_at_hand, read_config
from lit_adapter.weights.foreign import lit, official, peft
from lit_adapter.weights.foreign.gates import with_gates
from lit_adapter.weights.foreign.recognise import OURS, Opened, open_adapter
from lit_adapter.weights.measure import difference
from lit_adapter.weights.plain import PlainAdapter, State

TEMPLATES = {official.NAME: "alpaca", lit.LIT_LLAMA.name: "alpaca", lit.LITGPT.name: "alpaca-newline"}
"""What each code base's own Alpaca script trains with."""


@dataclass(frozen=True)
class Wishes:
    """What the command line asks for."""

    to: str = OURS
    given: str = "auto"
    base: Path | None = None
    template: str | None = None
    gate: GateName | None = None
    to_gate: GateName | None = None
    allow_lossy: bool = False
    overwrite: bool = False


def convert_adapter(source: Path, out: Path, wishes: Wishes) -> list[str]:
    """Convert, and return the report's lines.

    Raises:
        UserError: a source that is not understood or does not fit its base, a conversion that loses
            something without ``allow_lossy``, or an output that is in the way.
    """
    _check_output(source, out, wishes)
    opened = open_adapter(source, wishes.given)
    _check_wishes(opened, wishes)
    info, adapter, base = _read(opened, wishes)
    if base is not None:
        _refuse_inputs(out, wishes.to, [base])
    model = info.model
    adapter.check(model, str(source))
    if wishes.to == peft.NAME:
        peft.check_writable(adapter.config, model)
    elif wishes.to != OURS:
        lit.check_writable(model, _dialect(wishes.to))
    form = wishes.to_gate or _FORMS.get(wishes.to, adapter.config.gate)
    target, worst = with_gates(adapter, form, model)
    if worst and not wishes.allow_lossy:
        raise UserError(
            f"{source}: {wishes.to} has {'one gate a layer' if form == 'layer' else 'one gate a head'}, and "
            f"these differ, by up to {worst:.3g} from their mean; add --allow-lossy to write the means"
        )
    written = _foreign(target, model, wishes.to)
    again = target if written is None else _understood(written, model, wishes.to)
    report = _report(opened, adapter, target, worst, model, wishes.to)
    if base is None:
        report.append("logits    not compared: the base is not at hand (--base)")
    else:
        report.append(f"logits    {difference(base, adapter, again)}")
    _write(out, target, written, info, wishes)
    return [*report, f"wrote     {out}"]


_FORMS: dict[str, GateName] = {
    lit.LIT_LLAMA.name: "identity",
    lit.LITGPT.name: "identity",
    peft.NAME: "layer",
}


def _check_output(source: Path, out: Path, wishes: Wishes) -> None:
    with reading(source):
        source.exists()
    with reading(out):
        taken, is_folder = out.exists(), out.is_dir()
        _refuse_inputs(out, wishes.to, [source, source.parent / peft.CONFIG])
    if taken and not wishes.overwrite:
        raise UserError(f"{out}: already there; use --overwrite to replace it, or choose another --out")
    if taken and is_folder != (wishes.to == peft.NAME):
        kinds = ("a folder", "a file") if is_folder else ("a file", "a folder")
        raise UserError(f"{out}: is {kinds[0]}; with --to {wishes.to} --out names {kinds[1]}")


def _refuse_inputs(out: Path, to: str, inputs: list[Path]) -> None:
    written = (out / peft.WEIGHTS, out / peft.CONFIG) if to == peft.NAME else (out,)
    for path in written:
        refuse_input(path, inputs, "--out")


def _check_wishes(opened: Opened, wishes: Wishes) -> None:
    """Refuse options that would have no effect."""
    checks = (
        (wishes.gate, "--gate", opened.format == official.NAME, "an official source, which cannot say it"),
        (
            wishes.template,
            "--template",
            opened.format != OURS and wishes.to == OURS,
            "making ours of others'",
        ),
        (wishes.to_gate, "--to-gate", wishes.to == OURS, "--to ours; the others have one form each"),
    )
    for given, option, applies, where in checks:
        if given is not None and not applies:
            raise UserError(f"{option} is for {where}; leave it out")
    if opened.format == OURS == wishes.to and wishes.to_gate is None:
        raise UserError(f"{opened.path}: is in our format already; name another with --to, or a --to-gate")


def _read(opened: Opened, wishes: Wishes) -> tuple[AdapterInfo, PlainAdapter, Path | None]:
    """Return what is known of the adapter, its tensors, and its base's folder where it is at hand."""
    source = str(opened.path)
    if opened.format == OURS:
        info, state = read_adapter(opened.path)
        base = wishes.base or base_at_hand(info.base.name)
        if base is not None:
            check_base(info, base, opened.path)
        return info, PlainAdapter(info.adapter, state), base
    if wishes.base is None:
        raise UserError(f"{source}: does not say which base it belongs to; name its folder with --base")
    model = read_config(wishes.base)
    adapter = _understood(opened.tensors, model, opened.format, opened, wishes.gate)
    usual = TEMPLATES.get(opened.format, "alpaca")
    template = usual if wishes.template is None else wishes.template
    info = AdapterInfo(
        adapter=adapter.config,
        base=base_identity(wishes.base),
        base_config=model.to_hf(),
        template=resolve_template(template, load_tokenizer(wishes.base)),
        training={"converted_from": opened.format},
    )
    adapter.notes.append(f"template: {template}, {_origin_of_template(opened.format, wishes)}")
    return info, adapter, wishes.base


def _origin_of_template(format: str, wishes: Wishes) -> str:
    if wishes.template is not None:
        return "as --template says"
    if format in TEMPLATES:
        return f"which {format} trains with; the file does not say"
    return f"as a guess: {format} has none of its own, and the file does not say; --template names another"


def _understood(
    tensors: State,
    model: LlamaConfig,
    name: str,
    opened: Opened | None = None,
    gate: GateName | None = None,
) -> PlainAdapter:
    """Return the adapter that a format's tensors are."""
    source = str(opened.path) if opened else name
    if name == official.NAME:
        return official.read(tensors, model, gate, opened.args if opened else None, source)
    if name == peft.NAME:
        return peft.read(tensors, model, source)
    dialect = _dialect(name)
    if dialect is lit.LITGPT and any(f".{lit.LITGPT_BEFORE_055.fused}.adapter_" in key for key in tensors):
        dialect = lit.LITGPT_BEFORE_055
    return lit.read(tensors, model, dialect, source)


def _dialect(name: str) -> lit.Dialect:
    return lit.LITGPT if name == lit.LITGPT.name else lit.LIT_LLAMA


def _foreign(adapter: PlainAdapter, model: LlamaConfig, name: str) -> State | None:
    """Return the target format's tensors; None for ours."""
    if name == OURS:
        return None
    return peft.write(adapter, model) if name == peft.NAME else lit.write(adapter, model, _dialect(name))


def _write(
    out: Path, adapter: PlainAdapter, tensors: State | None, info: AdapterInfo, wishes: Wishes
) -> None:
    if tensors is None:
        own = AdapterInfo(
            adapter.config, info.base, info.base_config, info.template, info.mask_prompt, info.training
        )
        save_adapter(out, adapter.state, own)
    elif wishes.to == peft.NAME:
        write_bytes(out / peft.WEIGHTS, save(tensors, metadata={"format": "pt"}))
        write_json(out / peft.CONFIG, peft.settings(adapter, info.model, info.base.name))
    else:
        stream = io.BytesIO()
        torch.save({"model": tensors} if wishes.to == lit.LITGPT.name else tensors, stream)
        write_bytes(out, stream.getvalue())


def _report(
    opened: Opened, adapter: PlainAdapter, target: PlainAdapter, worst: float, model: LlamaConfig, to: str
) -> list[str]:
    """Say what was found, what was decided, what is exact and what is not."""
    config = adapter.config
    layers = config.adapted_layers(model.n_layer)
    found = f"{config.version.upper()}, {len(layers)} of {model.n_layer} layers"
    if layers:
        found += f" ({layers[0]} to {layers[-1]}), K {config.prompt_length}, gates {_named(config.gate)}"
    if config.version == "v2":
        found += f"; norms, biases and scales of all layers, {'with' if config.head else 'without'} the head"
    lines = [f"source    {opened.path}: {opened.format}, recognised by {opened.why}", f"found     {found}"]
    lines += [f"decided   {note}" for note in adapter.notes]
    same = [name for name, tensor in adapter.state.items() if torch.equal(tensor, target.state[name])]
    changed = len(adapter.state) - len(same)
    lines.append(f"exact     {len(same)} of {len(adapter.state)} tensors, bit for bit")
    if changed:
        how = (
            f"LOSSY: means of gates that differ from them by up to {worst:.3g}"
            if worst
            else "the same function"
        )
        lines.append(
            f"changed   {changed} gates, {_named(config.gate)} to {_named(target.config.gate)}: {how}"
        )
    if config.version == "v2" and lit.LIT_LLAMA.name in (opened.format, to):
        lines.append(
            "reordered rows of query and key biases and scales, between Meta's and Hugging Face's order"
        )
    if layers and lit.LITGPT.name in (opened.format, to):
        lines.append(f"note      {lit.WRONG_ROWS}")
    return lines


def _named(form: GateName) -> str:
    return {"tanh": "tanh a head", "identity": "identity a head", "layer": "identity a layer"}.get(
        form, "identity a channel"
    )
