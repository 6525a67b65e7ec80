"""The adapter of the official LLaMA-Adapter code: one table of prompts, and a gate in every layer.

``adapter_query.weight`` ``[L * K, C]`` holds the prompts of the lowest adapted layer first. The layers below
it have gates too, which stay 0. The file says neither how many layers are adapted nor which form its gates
have; the ``args`` of a training checkpoint say the first.
"""

from __future__ import annotations

from lit_adapter.errors import UserError
from lit_adapter.model.config import AdapterConfig, GateName, LlamaConfig
from lit_adapter.weights.foreign.format import Format, Opened, our_prefixes, refuse_rest, take, take_gates
from lit_adapter.weights.plain import PlainAdapter

QUERY = "adapter_query.weight"
GATE = "layers.{}.attention.gate"


class Official(Format):
    """LLaMA-Adapter V1, which is only read."""

    name = "official"
    families = ("llama",)
    template = "alpaca"
    asks_gate = True

    def recognise(self, opened: Opened) -> str | None:
        """Recognise it by the table of prompts."""
        if QUERY not in opened.tensors:
            return None
        return f"{QUERY}; a training checkpoint" if opened.wrapped else QUERY

    def read(self, opened: Opened, model: LlamaConfig, gate: GateName | None = None) -> PlainAdapter:
        """Return the adapter; a UserError also refuses a missing ``gate`` or an unknown number of layers."""
        source, left = opened.path, dict(opened.tensors)
        if gate is None:
            raise UserError(
                f"{source}: an official adapter does not say how its gates act; add --gate tanh (as in the "
                "official training code) or --gate identity (as in its example script)"
            )
        if opened.wrapped:  # a training checkpoint holds the base too
            left = {name: left[name] for name in left if name == QUERY or name.endswith(".attention.gate")}
        names = [GATE.format(layer) for layer in range(model.n_layer)]
        gates, form, single = take_gates(left, names, gate, model, source)
        table = take(left, QUERY, (-1, model.n_embd), source)
        refuse_rest(left, source, "the official code")
        n_layers, note = _count_layers(len(table), [bool(one.any()) for one in gates], opened)
        prompts = [prompt.clone() for prompt in table.chunk(n_layers)]
        state = our_prefixes(prompts, gates[-n_layers:], model.n_layer)
        config = AdapterConfig(prompt_length=len(prompts[0]), layers=n_layers, gate=form, norms=False)
        age = "; one per layer, as before April 2023" if single else ""
        return PlainAdapter(config, state, [note, f"gates: {gate}, as --gate says{age}"])


def _count_layers(n_rows: int, is_open: list[bool], opened: Opened) -> tuple[int, str]:
    """Return how many layers are adapted, and a line that says how that is known."""
    told = getattr(opened.args, "adapter_layer", None)
    if isinstance(told, int) and 0 < told <= len(is_open) and n_rows % told == 0:
        return told, f"layers: {told}, as the checkpoint's args say"
    count = len(is_open) - is_open.index(True) if any(is_open) else 0
    if not count or n_rows % count or not all(is_open[len(is_open) - count :]):
        raise UserError(
            f"{opened.path}: {n_rows} prompt rows and {sum(is_open)} open gates in {len(is_open)} layers do "
            "not say how many layers are adapted; give the training checkpoint, whose args say it"
        )
    return count, f"layers: the top {count}, whose gates are open"
