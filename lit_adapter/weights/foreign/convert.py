"""Convert an adapter from one format into another, and report what was exact and what was not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lit_adapter.errors import UserError
from lit_adapter.files.paths import refuse_input
from lit_adapter.files.read import reading
from lit_adapter.model.adapter import adapter_shapes, check_adapter_state
from lit_adapter.model.config import LlamaConfig
from lit_adapter.model.gates import GATE_FORMS, GateName
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import resolve_template
from lit_adapter.weights.adapter_file import AdapterInfo, base_identity, check_base
from lit_adapter.weights.base_content import check_content
from lit_adapter.weights.base_folder import read_config
from lit_adapter.weights.base_search import base_at_hand
from lit_adapter.weights.foreign.format import Format, Opened
from lit_adapter.weights.foreign.gates import with_gates
from lit_adapter.weights.foreign.recognise import FORMATS, open_adapter, recognise
from lit_adapter.weights.measure import difference
from lit_adapter.weights.plain import PlainAdapter

OURS = FORMATS["ours"]


@dataclass(frozen=True)
class ConversionOptions:
    """The options of the command line."""

    to: str = OURS.name
    given: str = "auto"
    """The source's format, or auto."""
    base: Path | None = None
    template: str | None = None
    gate: GateName | None = None
    to_gate: GateName | None = None
    allow_lossy: bool = False
    overwrite: bool = False


def convert_adapter(source: Path, out: Path, options: ConversionOptions) -> list[str]:
    """Convert, and return the report's lines.

    Raises:
        UserError: a source that is not understood or does not fit its base, a conversion that loses
            something without ``allow_lossy``, or an output that is in the way.
    """
    target = FORMATS[options.to]
    _check_output(source, out, target, overwrite=options.overwrite)
    opened = open_adapter(source)
    origin, why = recognise(opened, options.given)
    _check_options(source, origin, target, options)
    info, adapter, base = _read(opened, origin, target, options)
    if base is not None:
        _refuse_inputs(out, target, [base])
    model = info.model
    check_adapter_state(adapter_shapes(adapter.config, model), adapter.state, str(source))
    target.check_writable(adapter.config, model)
    form = options.to_gate or target.gate or adapter.config.gate
    changed, worst = with_gates(adapter, form, model)
    if worst and not options.allow_lossy:
        raise UserError(
            f"{source}: {target.name} has one gate {GATE_FORMS[form].description.partition(' ')[2]}, and the "
            f"gates differ, by up to {worst:.3g} from their mean; train with --adapter.gate {form}, or add "
            "--allow-lossy to write the means"
        )
    info = replace(info, adapter=changed.config)
    tensors = target.write(changed, model)
    again = target.read(Opened(out, tensors, info), model)
    report = [f"source    {source}: {origin.name}, recognised by {why}", _found(adapter, model)]
    report += [f"decided   {note}" for note in adapter.notes]
    report += _exactness(adapter, changed, worst)
    report += [line for used in dict.fromkeys((origin, target)) for line in used.remarks(adapter.config)]
    if base is None:
        report.append("logits    not compared: the base is not at hand (--base)")
    else:
        report.append(f"logits    {difference(base, adapter, again)}")
    target.save(out, tensors, info)
    return [*report, f"wrote     {out}"]


def _check_output(source: Path, out: Path, target: Format, *, overwrite: bool) -> None:
    with reading(source):
        source.exists()
    with reading(out):
        taken, is_folder = out.exists(), out.is_dir()
        beside = [source.parent / form.companion for form in FORMATS.values() if form.companion]
        _refuse_inputs(out, target, [source, *beside])
    if taken and not overwrite:
        raise UserError(f"{out}: already there; use --overwrite to replace it, or choose another --out")
    if taken and is_folder != bool(target.companion):
        kinds = ("a folder", "a file") if is_folder else ("a file", "a folder")
        raise UserError(f"{out}: is {kinds[0]}; with --to {target.name} --out names {kinds[1]}")


def _refuse_inputs(out: Path, target: Format, inputs: list[Path]) -> None:
    for path in target.outputs(out):
        refuse_input(path, inputs, "--out")


def _check_options(source: Path, origin: Format, target: Format, options: ConversionOptions) -> None:
    """Refuse options that would have no effect."""
    foreign = origin is not OURS and target is OURS
    checks = (
        (options.gate, "--gate", origin.asks_gate, "an official source, whose file does not say it"),
        (options.template, "--template", foreign, "a source of another format and --to ours"),
        (options.to_gate, "--to-gate", target is OURS, "--to ours; every other format has one gate form"),
    )
    for given, option, applies, where in checks:
        if given is not None and not applies:
            raise UserError(f"{option} is for {where}; leave it out")
    if origin is OURS is target and options.to_gate is None:
        raise UserError(f"{source}: is in our format already; add --to with another, or --to-gate")


def _read(
    opened: Opened, origin: Format, target: Format, options: ConversionOptions
) -> tuple[AdapterInfo, PlainAdapter, Path | None]:
    """Return what is known of the adapter, its tensors, and its base's folder if available."""
    base = options.base
    if opened.info is not None:
        base = base or base_at_hand(opened.info.base, opened.path)
        if base is not None:
            check_base(opened.info, base, opened.path)
            check_content(base)
        target.check_family(opened.info.model)
        return opened.info, origin.read(opened, opened.info.model), base
    if base is None:
        raise UserError(f"{opened.path}: does not say which base it belongs to; name its folder with --base")
    check_content(base)
    model = read_config(base)
    for form in (origin, target):
        form.check_family(model)
    adapter = origin.read(opened, model, options.gate)
    template = options.template
    if template is not None:
        reason = "as --template says"
    elif origin.template is not None:
        template, reason = origin.template, f"which {origin.name} trains with; the file does not say"
    else:
        template = "alpaca"
        reason = f"a guess, because neither {origin.name} nor the file says; --template names another"
    adapter.notes.append(f"template: {template}, {reason}")
    info = AdapterInfo(
        adapter=adapter.config,
        base=base_identity(base),
        base_config=model.to_hf(),
        template=resolve_template(template, load_tokenizer(base)),
        training={"converted_from": origin.name},
    )
    return info, adapter, base


def _found(adapter: PlainAdapter, model: LlamaConfig) -> str:
    config = adapter.config
    layers = config.adapted_layers(model.n_layer)
    found = f"found     {config.version.upper()}, {len(layers)} of {model.n_layer} layers"
    if layers:
        form = GATE_FORMS[config.gate].description
        found += f" ({layers[0]} to {layers[-1]}), K {config.prompt_length}, gates {form}"
        found += f", {config.prefix_query} queries" if config.prefix_query != "rotated" else ""
    if "linears" in config.parts:
        with_output = "with" if config.head else "without"
        found += f"; norms, biases and scales of all layers, {with_output} the output layer"
    elif "norms" in config.parts:
        learning = config.learning_layers(model.n_layer)
        found += f"; norms of {'all' if len(learning) == model.n_layer else 'these'} layers"
    if "lora" in config.parts:
        lora = config.lora
        found += f"; LoRA of rank {lora.rank}, scale {lora.scale:g}, on {' '.join(lora.on)}"
    return found


def _exactness(adapter: PlainAdapter, changed: PlainAdapter, worst: float) -> list[str]:
    """Say how many tensors stay bit for bit, and what happens to the others, which are all gates."""
    n_same = sum(torch.equal(tensor, changed.state[name]) for name, tensor in adapter.state.items())
    lines = [f"exact     {n_same} of {len(adapter.state)} tensors, bit for bit"]
    if n_same < len(adapter.state):
        given, wanted = (GATE_FORMS[one.config.gate].description for one in (adapter, changed))
        how = f"LOSSY: means, from which gates differ by up to {worst:.3g}" if worst else "the same function"
        lines.append(f"changed   {len(adapter.state) - n_same} gates, {given} to {wanted}: {how}")
    return lines
