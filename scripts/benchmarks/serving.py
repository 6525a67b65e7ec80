"""The comparison of serving: a server's rate beside the engine's own, and the time to first tokens.

The clients have a process of their own, so that what they compute is not the server's. Under load, requests
arrive by a Poisson process, which does not wait for answers.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.clients import FEW_TOKENS, Answered, Clients, Seconds
from benchmarks.report import Report, Row
from lit_adapter.files.read import read_json
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.generation.engine import Engine
from lit_adapter.generation.load import load
from lit_adapter.generation.request import Request
from lit_adapter.generation.settings import Sampling
from lit_adapter.model.adapter import adapter_shapes
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.serving.adapters import Adapters
from lit_adapter.serving.loading import load_adapters
from lit_adapter.serving.options import ServerOptions
from lit_adapter.serving.run import serve
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import resolve_template
from lit_adapter.weights.adapter_file import AdapterInfo, base_identity, save_adapter


def save_adapters(
    base: Path, folder: Path, number: int, seed: int, config: AdapterConfig, name: str = "a"
) -> dict[str, Path]:
    """Write adapters of one form with random prompts, open gates and norms about 1."""
    raw = read_json(base / "config.json")
    shapes = adapter_shapes(config, LlamaConfig.from_hf(raw))
    template = resolve_template("alpaca", load_tokenizer(base))
    info = AdapterInfo(config, base_identity(base), raw, template)
    found = {}
    for n in range(number):
        generator = torch.Generator().manual_seed(seed + n)
        state = {
            tensor: 0.3 * torch.randn(shape, generator=generator) + tensor.endswith("adapter_weight")
            for tensor, shape in shapes.items()
        }
        found[f"{name}{n}"] = folder / f"{name}{n}.safetensors"
        save_adapter(found[f"{name}{n}"], state, info)
    return found


def own_bytes(model: AdaptedLlama) -> int:
    """Return the bytes of what decoding takes of an adapter; its other tensors are in the host's memory."""
    stacked = model.adapter.prefixes.stacked
    return sum(x.nbytes for x in vars(stacked).values() if isinstance(x, torch.Tensor)) if stacked else 0


def bytes_on_device(adapters: Adapters) -> float:
    """Return what the adapters that are served take of a device's memory, on a CPU by calculation."""
    if torch.cuda.is_available() and adapters.base.model.model.embed_tokens.weight.is_cuda:
        torch.cuda.synchronize()
        return float(torch.cuda.memory_allocated())
    return sum(own_bytes(served.model) for served in adapters if served.path is not None)


def load_many(report: Report, options: ServerOptions, paths: Sequence[Path], number: int) -> None:
    """Load adapters from a few files, over and over, as a server does, and put the row into the report."""
    adapters = load_adapters(options)

    def load() -> None:
        for n in range(number):
            adapters.load(f"x{n}", paths[n % len(paths)])

    before = bytes_on_device(adapters)
    wall, cpu = timed(load)
    each = (bytes_on_device(adapters) - before) / number
    row: Row = {"name": f"{number} adapters loaded", "useful_tokens_per_s": None}
    report.put(row | {"seconds": wall, "cpu_seconds": cpu, "bytes_each": each})


@contextmanager
def served(**options: Any) -> Iterator[str]:
    """Run a server in a thread, and give its address."""
    ready: Future[tuple[str, Callable[[], None]]] = Future()

    def run() -> None:
        try:
            serve(ServerOptions(port=0, **options), lambda *found: ready.set_result(found))
        except BaseException as error:
            ready.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    url, stop = ready.result(600)
    try:
        yield url
    finally:
        stop()
        thread.join()


def by_engine(models: Sequence[AdaptedLlama], prompts: Sequence[Sequence[int]], n_new: int) -> None:
    """Let an engine make the same answers, without a server."""
    bias = {0: -100.0, 1: -100.0, 2: -100.0}
    requests = [
        Request(prompt, Sampling(max_new_tokens=n_new), model.adapter, bias=bias)
        for model, prompt in zip(models, prompts, strict=True)
    ]
    for _ in Engine().run(requests, len(requests)):
        pass


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds that work takes, and those of processors in this process, the clients' excepted."""
    started, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - cpu


def quantile(values: Seconds, share: float) -> float:
    """Return the value below which this share of the values is."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def compare(options: Any, report: Report) -> None:
    """Measure, and put the rows into the report; the engine and the server take turns."""
    base = Path(options.model)
    chance = random.Random(options.seed)
    vocab = read_json(base / "config.json")["vocab_size"]
    streams, n_new = options.streams or 8, options.new_tokens or 32
    length = options.prompt_tokens or 64

    def prompt(n: int = length) -> list[int]:
        return [chance.randrange(100, vocab) for _ in range(n)]

    with TemporaryDirectory() as folder:
        paths = save_adapters(base, Path(folder), streams, options.seed, AdapterConfig(norms=False))
        normed = save_adapters(base, Path(folder), streams, options.seed, AdapterConfig(norms=True), "n")
        plain = load(base=base, device=options.device, dtype=options.base_dtype)
        loading = ServerOptions(base=base, device=options.device, dtype=options.base_dtype)
        load_many(report, loading, list(paths.values()), 200)
        models = {name: plain.with_adapter(path) for name, path in (paths | normed).items()}
        names = list(paths)
        given = {"base": base, "adapters": paths | normed, "device": options.device, "slots": streams}
        context = max(1400, length + n_new)
        with served(**given, context=context, dtype=options.base_dtype) as url, Clients(url) as clients:
            for kinds in dict.fromkeys((1, min(8, streams), streams)):
                for kind, of in (("", names), (" with norms", list(normed))):
                    asked = [of[n % kinds] for n in range(streams)]
                    _rates(report, clients, asked, models, prompt, n_new, options.repeats, kind)
            _first_tokens(report, clients, names[0], prompt, "")
            _first_tokens(report, clients, next(iter(normed)), prompt, " with norms")
            capacity = report.rows[f"server, {streams} streams, {streams} adapters"]["useful_tokens_per_s"]
            asked = [names[n % streams] for n in range(6 * streams)]
            rate = 0.75 * capacity / n_new
            found = clients.arrivals(asked, [prompt() for _ in asked], n_new, rate, options.seed)
            answered = [each.first for each in found if each.times]
            refused = len(found) - len(answered)
            _put(report, f"first token of {length}, 75 % load", first=answered, refused=refused)


def _first_tokens(
    report: Report, clients: Clients, name: str, prompt: Callable[[int], list[int]], kind: str
) -> None:
    """Measure first tokens of an idle server, also of prompts whose first 1,000 tokens it has read before."""
    for n in (20, 64, 512):
        alone = [clients.ask(name, prompt(n), FEW_TOKENS).first for _ in range(15)]
        _put(report, f"first token of {n}, idle{kind}", first=alone)
    cold, warm = [], []
    for _ in range(3):
        start = prompt(1000)
        first, *later = (clients.ask(name, start + prompt(20), FEW_TOKENS).first for _ in range(6))
        cold.append(first)
        warm += later
    _put(report, f"shared start of 1,000: first request{kind}", first=cold)
    _put(report, f"shared start of 1,000: later requests{kind}", first=warm)


def _rates(
    report: Report,
    clients: Clients,
    names: Sequence[str],
    models: dict[str, AdaptedLlama],
    prompt: Callable[[], list[int]],
    n_new: int,
    repeats: int,
    kind: str,
) -> None:
    rates: dict[str, Seconds] = {"engine": [], "server": []}
    ratios, cpu, unfair = [], [], []
    own = [models[name] for name in names]
    n_tokens = len(names) * n_new
    for _ in range(repeats):
        prompts = [prompt() for _ in names]  # new ones: the server would not compute known ones again
        engine = timed(lambda: by_engine(own, prompts, n_new))  # noqa: B023
        found: list[Answered] = []
        server = timed(lambda: found.extend(clients.together(names, prompts, n_new)))  # noqa: B023
        rates["engine"].append(n_tokens / engine[0])
        rates["server"].append(n_tokens / server[0])
        ratios.append(engine[0] / server[0])
        cpu.append(server[1] / engine[1])
        last = [each.times[-1] for each in found]
        unfair.append(max(last) / min(last))
    for name, values in rates.items():
        row: Row = {
            "name": f"{name}, {len(names)} streams, {len(set(names))} adapters{kind}",
            "useful_tokens_per_s": statistics.median(values),
            "useful_tokens_per_s_spread": [min(values), max(values)],
        }
        if name == "server":
            row |= {"ratio": statistics.median(ratios), "cpu_ratio": statistics.median(cpu)}
            row["slowest_to_fastest"] = max(unfair)
        report.put(row)


def _put(report: Report, name: str, *, first: Seconds, refused: int = 0) -> None:
    quantiles = {"first_p50": statistics.median(first), "first_p99": quantile(first, 0.99)}
    counts = {"n": len(first), "refused": refused}
    report.put({"name": name, "useful_tokens_per_s": None, **counts, **quantiles})
