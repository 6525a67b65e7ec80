"""An adapter's model card on the Hub, written from the file's metadata."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lit_adapter.model.adapter import adapter_shapes
from lit_adapter.weights.adapter_file import AdapterInfo
from lit_adapter.weights.base_folder import read_fingerprint

_TRAINING = {
    "data": "data",
    "epochs": "epochs planned",
    "batch_size": "records per step",
    "lr": "peak learning rate",
    "steps": "optimizer steps taken",
    "train_loss": "training loss of the last step",
    "val_loss": "held-out loss (nats per target)",
    "converted_from": "converted from the format",
}


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation adds to a card."""

    results: list[dict[str, Any]] = field(default_factory=list)
    """The Hub's ``model-index`` of the adapter: tasks, data sets and metrics."""
    section: str = ""
    """A section in Markdown, which may show ``files``."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Pictures, by their names in the repository."""


def model_card(
    info: AdapterInfo, repository: str, base: Path | None, evaluated: Evaluated | None = None
) -> str:
    """Return the card's Markdown for the repository ``org/name``; ``base`` is its base, if available."""
    origin = read_fingerprint(base)["source"].get("model") if base is not None else None
    other_name = f" ({origin})" if origin and origin != info.base.name else ""
    known = origin if isinstance(origin, str) and origin.count("/") == 1 else None
    header = ["---", "library_name: lit_adapter", "tags: [llama-adapter]"]
    header += [f"base_model: {json.dumps(known)}"] if known else []
    name = repository.rpartition("/")[2]
    if evaluated is not None and evaluated.results:
        index = {"model-index": [{"name": name, "results": evaluated.results}]}
        header += yaml.safe_dump(index, sort_keys=False).splitlines()
    header += ["# license: yours to fill in; base and data have terms of their own", "---"]
    parts = [
        "\n".join(header),
        f"# {name}",
        _what(info),
        f"## Base\n\n`{info.base.name}`{other_name}\n\n"
        f"- weights: SHA-256 `{info.base.weights}`\n- tokenizer: SHA-256 `{info.base.tokenizer}`",
        f"## Prompts\n\nTemplate `{info.template.kind}`:\n\n{_indented(info.template.text)}",
    ]
    if info.template.text_without_input is not None:
        parts.append(f"Without input:\n\n{_indented(info.template.text_without_input)}")
    told = {text: _shown(info.training[key]) for key, text in _TRAINING.items() if key in info.training}
    if told:
        rows = "\n".join(f"| {text} | {value} |" for text, value in told.items())
        parts.append(f"## Training\n\n| | |\n|---|---|\n{rows}")
    if evaluated is not None and evaluated.section:
        parts.append(evaluated.section.strip())
    parts.append(
        "## Use\n\nWith lit_adapter, and the base converted to "
        f"`checkpoints/{info.base.name}`:\n\n"
        f"    python scripts/download.py {repository} --adapter\n"
        f'    python scripts/generate.py --adapter out/{name}.safetensors --prompt "..."'
    )
    parts.append("## License\n\nTo be filled in by the author.")
    return "\n\n".join(parts) + "\n"


def _what(info: AdapterInfo) -> str:
    config, model = info.adapter, info.model
    count = sum(math.prod(shape) for shape in adapter_shapes(config, model).values())
    layers = len(config.adapted_layers(model.n_layer))
    kind = f"A LLaMA-Adapter {config.version.upper()}" if layers or "linears" in config.parts else "LoRA"
    text = f"{kind}: {count:,} trained parameters on a frozen base."
    if layers:
        text += (
            f" Prompts of {config.prompt_length} rows in the top {layers} of {model.n_layer} layers, "
            f"gates of form `{config.gate}`."
        )
        if config.prefix_query == "unrotated":
            text += " Queries attend to them before rotary positions are applied."
    if "linears" in config.parts:
        output = ", and on the output layer" if config.head else ""
        text += f" Norms, and a bias and scale on every linear layer{output}."
    elif "norms" in config.parts:
        whole = len(config.learning_layers(model.n_layer)) == model.n_layer
        text += (
            " The weight of every norm." if whole else " The weights of these layers' norms and of the last."
        )
    if "lora" in config.parts:
        lora = config.lora
        text += f" LoRA of rank {lora.rank}, scaled by {lora.scale:g}, on {', '.join(sorted(lora.layers))}."
    return text


def _shown(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))
