"""What Python users hold: a base with its adapter, ready to be prompted.

import lit_adapter
model = lit_adapter.load(adapter="out/run/adapter.safetensors")
print(model.generate("Name three colours."))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_adapter.device import choose_device, choose_dtype, free_bytes
from lit_adapter.errors import UserError
from lit_adapter.generation.adapter import Adapter, attached
from lit_adapter.generation.engine import Engine
from lit_adapter.generation.request import Request
from lit_adapter.generation.settings import Sampling
from lit_adapter.model.attention import CausalView
from lit_adapter.model.layout import base_shapes
from lit_adapter.model.llama import Llama
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import Template, resolve_template
from lit_adapter.text.tokenizer import StreamDecoder, Tokenizer, check_vocabulary
from lit_adapter.weights.adapter_file import AdapterInfo, check_base, read_adapter
from lit_adapter.weights.base_content import check_content
from lit_adapter.weights.base_folder import read_config
from lit_adapter.weights.base_search import find_base
from lit_adapter.weights.load import load_base

Task = tuple[str, str]
"""Instruction and input."""


@dataclass(frozen=True, eq=False)
class _Loaded:
    """What all adapters on one loaded base share."""

    folder: Path
    model: Llama  # the plain base
    engine: Engine


class AdaptedLlama:
    """A base, with or without an adapter, its tokenizer and the template it is prompted with.

    Any number of threads may use it, and others on the same base: each request has its own adapter, and those
    under way at the same time are answered together.

    Args:
        model: with its adapter attached, if it has one.
        tokenizer: the base's.
        template: what tasks are rendered with.
        loaded: the base that others share; None for a model whose adapter may still be trained: every call
            takes it as it is then.
    """

    def __init__(
        self, model: Llama, tokenizer: Tokenizer, template: Template, loaded: _Loaded | None = None
    ) -> None:
        self.model, self.tokenizer, self.template, self._loaded = model, tokenizer, template, loaded
        self._engine = loaded.engine if loaded is not None else Engine()
        self._adapter = Adapter.of(model, loaded.model) if loaded is not None else None

    @property
    def base(self) -> AdaptedLlama:
        """The plain base, prompted with the same template."""
        loaded = self._shared()
        return AdaptedLlama(loaded.model, self.tokenizer, self.template, loaded)

    def with_adapter(self, path: str | Path) -> AdaptedLlama:
        """Return the same base with another adapter, which brings its template; no weight is loaded twice.

        Raises:
            UserError: a file that is missing, damaged, or of another base.
        """
        path = Path(path)
        info, state = read_adapter(path)
        check_base(info, self._shared().folder, path)
        return self._with(info, state, path)

    def _with(self, info: AdapterInfo, state: dict[str, Tensor], path: Path) -> AdaptedLlama:
        loaded = self._shared()
        model = attached(loaded.model, info.adapter, state, str(path))
        return AdaptedLlama(model, self.tokenizer, info.template, loaded)

    def _shared(self) -> _Loaded:
        if self._loaded is None:
            raise ValueError("only a model from `load` knows its plain base")
        return self._loaded

    def generate(self, instruction: str, input: str = "", **sampling: Any) -> str:
        """Answer one task; `Sampling` describes the settings."""
        return "".join(self.stream(instruction, input, **sampling))

    def stream(self, instruction: str, input: str = "", **sampling: Any) -> Iterator[str]:
        """Answer one task, piece by piece; no piece ends inside a character."""
        for _, piece in self._answers([(instruction, input)], Sampling.of(**sampling), batch_size=1):
            if piece:
                yield piece

    def generate_batch(
        self,
        tasks: Sequence[Task],
        *,
        batch_size: int = 16,
        finished: Callable[[int], None] = lambda number: None,
        stopped: Callable[[], bool] = lambda: False,
        **sampling: Any,
    ) -> list[str]:
        """Answer many tasks together.

        Args:
            tasks: instruction and input of each.
            batch_size: answered at a time.
            finished: called with the index of every task that is done.
            stopped: asked after every piece of text; once true, the answers are returned as they are.
            sampling: described in `Sampling`.
        """
        answers = [""] * len(tasks)
        for number, piece in self._answers(tasks, Sampling.of(**sampling), batch_size):
            if piece is None:
                finished(number)
            else:
                answers[number] += piece
            if stopped():
                break
        return answers

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits ``[B, T, V]``, fp32, of token ids ``[B, T]`` without a template."""
        ids = ids.to(self.model.embed_tokens.weight.device)
        position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return self.model.logits(self.model(ids, CausalView(self.model.rotation(position)))).float()

    def _answers(
        self, tasks: Sequence[Task], settings: Sampling, batch_size: int
    ) -> Iterator[tuple[int, str | None]]:
        """Yield ``(index of the task, piece of text)``, and ``(index, None)`` at each end."""
        prompts = [self.template.encode_prompt(self.tokenizer, *task) for task in tasks]
        stop_ids, adapter = self.template.stop_ids(self.tokenizer), self._adapter or Adapter.of(self.model)
        requests = [Request(prompt, settings, adapter, stop_ids) for prompt in prompts]
        answers = [_Answer(self.tokenizer, settings.stop) for _ in tasks]
        with closing(self._engine.run(requests, batch_size)) as events:
            for index, token in events:
                piece = answers[index].push(token)
                if answers[index].stopped:
                    self._engine.cancel(requests[index])
                if piece:
                    yield index, piece
                if token is None:
                    yield index, None


class _Answer:
    """An answer's text as its tokens come; text that may begin a stop text is held back."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self.decoder = StreamDecoder(tokenizer)
        self.stop, self.held, self.stopped = stop, "", False

    def push(self, token: int | None) -> str:
        """Return the text that a token, or with None the end, makes certain to belong to the answer."""
        if self.stopped:
            return ""
        text = self.held + (self.decoder.flush() if token is None else self.decoder.push(token))
        places = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if places:
            self.stopped = True
            return text[: min(places)]
        begun = (n for stop in self.stop for n in range(len(stop)) if text.endswith(stop[:n]))
        keep = 0 if token is None else max(begun, default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def load(
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    template: str | None = None,
    verify: bool = False,
) -> AdaptedLlama:
    """Load an adapter on its base, or a plain base.

    Args:
        adapter: an ``adapter.safetensors``; None for the plain base.
        base: a converted base folder; by default the one the adapter names (`base_search` says where it is
            looked for).
        device: ``cpu`` or ``cuda``, which CUDA_VISIBLE_DEVICES chooses; by default CUDA where there is one.
        dtype: ``float32``, ``bfloat16`` or ``float16``; by default fp32 on a CPU with memory for it, which is
            faster for one request at a time, and otherwise bf16 where the device multiplies it faster.
        template: prompt template of a plain base (``alpaca`` by default); an adapter brings its own.
        verify: compare every byte of the base with its checksums, also where its files look unchanged.

    Raises:
        UserError: files that are missing, damaged, changed, or do not belong together.
    """
    if adapter is None and base is None:
        raise UserError("give an adapter, a base, or both")
    if adapter is not None and template is not None:
        raise UserError("an adapter brings its template; leave template out")
    info, state = read_adapter(Path(adapter)) if adapter is not None else (None, {})
    folder = Path(str(base))
    if base is None and info is not None:
        folder = find_base(info.base.name, Path(str(adapter)))
    if info is not None:
        check_base(info, folder, Path(str(adapter)))
    target = choose_device(device)
    check_content(folder, everything=verify)
    tokenizer = load_tokenizer(folder)
    if dtype in (None, "auto") and target.type == "cpu" and _fits_in_fp32(folder):
        dtype = torch.float32
    model = load_base(folder, device=target, dtype=choose_dtype(dtype, target)).eval()
    check_vocabulary(tokenizer, model.config.vocab_size)
    chosen = (
        info.template
        if info is not None
        else resolve_template("alpaca" if template is None else template, tokenizer)
    )
    plain = AdaptedLlama(model, tokenizer, chosen, _Loaded(folder, model, Engine()))
    return plain if info is None else plain._with(info, state, Path(str(adapter)))


def _fits_in_fp32(folder: Path) -> bool:
    """Whether free memory holds a base in fp32, and as much again for its cache and everything else."""
    free = free_bytes(torch.device("cpu"))
    n_bytes = 4 * sum(math.prod(shape) for shape in base_shapes(read_config(folder)).values())
    return free is None or 2 * n_bytes <= free
