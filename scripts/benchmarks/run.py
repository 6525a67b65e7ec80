"""The three benchmarks, from options to table."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import generation, machine, training, workload
from benchmarks.models import Base, read_base
from benchmarks.report import Column, Report, number, spread, spread_if_any
from lit_adapter.data.encode import Encoded
from lit_adapter.device import choose_device, choose_dtype
from lit_adapter.errors import UserError, nearest
from lit_adapter.files.write import write_text

TRAINING: tuple[Column, ...] = (
    ("useful tokens/s (spread)", spread),
    ("recipe, s", number("recipe_seconds")),
    ("utilisation", number("utilisation", ".1%")),
    ("micro-batch", number("micro_batch")),
    ("activations, MB/token", number("activation_bytes_per_token", ".3f", 1e-6)),
    ("peak beside weights, GB", number("peak_bytes_beside_weights", ".2f", 1e-9)),
    ("loss before", number("loss_before", ".4f")),
    ("loss after", number("loss_after", ".4f")),
    ("warm-up, s", number("warmup_seconds", ".1f")),
    ("compilations while timed", number("compilations_while_timed")),
    ("GPU idle", number("gpu_idle_share", ".1%")),
)
DECODING: tuple[Column, ...] = (
    ("tokens/s (spread)", spread),
    ("tokens/s, whole call", number("call_tokens_per_s", ",.1f")),
    ("first token, ms", number("first_token_seconds", ",.1f", 1e3)),
    ("warm-up, s", number("warmup_seconds", ".1f")),
)


SERVING: tuple[Column, ...] = (
    ("tokens/s (spread)", spread_if_any),
    ("of the engine's", number("ratio", ".1%")),
    ("processor time, of the engine's", number("cpu_ratio", ".1%")),
    ("slowest/fastest", number("slowest_to_fastest", ".2f")),
    ("first token p50, ms", number("first_p50", ",.1f", 1e3)),
    ("first token p99, ms", number("first_p99", ",.1f", 1e3)),
    ("s", number("seconds", ",.1f")),
    ("s of processors", number("cpu_seconds", ",.1f")),
    ("MB each", number("bytes_each", ",.2f", 1e-6)),
)


def train(options: Any) -> tuple[str, bool]:
    """Compare training; return the table and whether all of our own methods ran."""
    device, base = _base(options)
    cuda = device.type == "cuda"
    options.row_tokens = options.row_tokens or ([8192, 2048] if cuda else [2048])
    options.peft_batch = options.peft_batch or ([16, 32, 64] if cuda else [4, 8, 16])
    work = _workload(options, base, cuda)
    report = _report(options, base, {"workload": work.describe(), "batch": work.batch, "steps": work.steps})
    found = training.entries(base, work, options)
    usual = [name for name in found if not name.startswith("saving-")]
    if not cuda:
        usual = [name for name in usual if not name.endswith(("-liger", "-compiled", "-float8"))]
    chosen = _chosen(options.methods, found, usual)
    training.Comparison(base, work, {name: found[name] for name in chosen}, report, options.repeats).run()
    return _finish(options, report, TRAINING)


def generate(options: Any) -> tuple[str, bool]:
    """Compare decoding; return the table and whether our own method ran."""
    device, base = _base(options)
    options.n_new, options.prompt_tokens = options.new_tokens or 256, options.prompt_tokens or 64
    options.first_token_prompt = options.first_token_prompt or (512 if device.type == "cuda" else 200)
    batches, vocab = options.batches or [1, 32], base.model.config.vocab_size
    n_longest = max(options.prompt_tokens, options.first_token_prompt if 1 in batches else 0)
    longest = max(options.prompt_tokens + options.n_new, n_longest + 1)
    if longest > base.model.config.context_length:
        raise UserError(
            f"a text of {longest} tokens, but the base's context is {base.model.config.context_length}; "
            "lower --new-tokens, --prompt-tokens or --first-token-prompt"
        )
    ids = prompt_ids(options, vocab, max(batches), n_longest).to(device)
    found = generation.makers(base, options)
    usual = found if device.type == "cuda" else [name for name in found if name != "transformers-static"]
    report = _report(options, base, {"n_new": options.n_new, "prompt_tokens": options.prompt_tokens})
    chosen = [found[name] for name in _chosen(options.methods, found, usual)]
    cases = [generation.Case(name, batch, make) for batch in batches for name, make in chosen]
    for batch in batches:
        report.put(generation.limit(base, batch, report.machine["copy_bytes_per_s"]))
    generation.Decoding(base, cases, report, options, ids).run()
    return _finish(options, report, DECODING)


def serve(options: Any) -> tuple[str, bool]:
    """Compare a server with its engine; return the table."""
    from benchmarks import serving

    _, base = _base(options)
    options.base_dtype = base.model.embed_tokens.weight.dtype
    report = _report(
        options, base, {"new_tokens": options.new_tokens, "prompt_tokens": options.prompt_tokens}
    )
    del base
    serving.compare(options, report)
    return _finish(options, report, SERVING)


def _base(options: Any) -> tuple[torch.device, Base]:
    device = choose_device(options.device)
    dtype = choose_dtype(options.base_precision, device)
    torch.set_float32_matmul_precision("highest")
    return device, read_base(options.model, device, dtype, options.seed)


def _workload(options: Any, base: Base, cuda: bool) -> workload.Workload:
    batch, steps = options.batch or (64 if cuda else 32), options.steps or (4 if cuda else 1)
    vocab = base.model.config.vocab_size
    if options.data:
        encoded = _from_file(options, vocab)
        source = Path(options.data).name
    else:
        encoded = workload.alpaca_like(batch * steps * (options.repeats + 1), vocab, options.seed)
        source = "random tokens, Alpaca's lengths"
    if len(encoded) < batch * steps:
        raise UserError(f"{source}: {len(encoded)} records, but a pass has {batch * steps}; lower --batch")
    return workload.Workload(encoded, source, batch, steps, options.seed)


def prompt_ids(options: Any, vocab: int, n_texts: int, length: int) -> torch.Tensor:
    """Return prompt ids ``[n_texts, length]``: random, or those of the data's records end to end."""
    if not options.data:
        draw = torch.Generator().manual_seed(options.seed)
        return torch.randint(min(10, vocab - 1), vocab, (n_texts, length), generator=draw)
    ids = _from_file(options, vocab).ids
    if len(ids) < length:
        raise UserError(f"{options.data}: {len(ids)} tokens, but a prompt has {length}")
    place = torch.arange(n_texts)[:, None] * length + torch.arange(length)
    return torch.from_numpy(ids.astype("int64"))[place % len(ids)]


def _from_file(options: Any, vocab: int) -> Encoded:
    return workload.from_file(options.data, Path(options.tokenizer or options.model), vocab)


def _report(options: Any, base: Base, facts: dict[str, Any]) -> Report:
    about = machine.describe(base.device, base.dtype)
    about |= {"model": base.name, "weights_bytes": base.n_bytes, "seed": options.seed, **facts}
    return Report(about, options.json)


def _chosen(names: list[str] | None, known: dict[str, Any], usual: Iterable[str]) -> list[str]:
    """Return the methods that were asked for.

    Raises:
        UserError: a name that no method has.
    """
    for name in names or []:
        if name not in known:
            hint = nearest(name, list(known)) or f"; expected {', '.join(known)}"
            raise UserError(f"--methods: no method '{name}'{hint}")
    return list(names or usual)


def _finish(options: Any, report: Report, columns: tuple[Column, ...]) -> tuple[str, bool]:
    table = report.markdown(columns)
    if options.markdown:
        write_text(Path(options.markdown), table + "\n")
    ours = [row for name, row in report.rows.items() if name.startswith("ours")]
    return table, not any("error" in row for row in ours)
