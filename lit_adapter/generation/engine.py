"""What Python users hold: a base with its adapter, ready to be prompted.

import lit_adapter
model = lit_adapter.load(adapter="out/run/adapter.safetensors")
print(model.generate("Name three colours."))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_adapter.device import choose_device, choose_dtype, free_bytes
from lit_adapter.errors import UserError
from lit_adapter.generation.decode import decode
from lit_adapter.generation.settings import Sampling
from lit_adapter.model.adapter import attach, load_adapter_state, plain_base
from lit_adapter.model.attention import CausalView
from lit_adapter.model.cpu_decode import DecodeWeights
from lit_adapter.model.layout import base_shapes
from lit_adapter.model.llama import Llama
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import Template, resolve_template
from lit_adapter.text.tokenizer import StreamDecoder, Tokenizer, check_vocabulary
from lit_adapter.weights.adapter_file import check_base, read_adapter
from lit_adapter.weights.base_folder import find_base, read_config
from lit_adapter.weights.load import load_base

Task = tuple[str, str]
"""Instruction and input."""


class AdaptedLlama:
    """A base, with or without an adapter, its tokenizer and the template it is prompted with."""

    def __init__(self, model: Llama, tokenizer: Tokenizer, template: Template) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template

    def generate(self, instruction: str, input: str = "", **sampling: Any) -> str:
        """Answer one task; see `Sampling` for the settings."""
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
            finished: is told the number of every task that is done.
            stopped: asked after every piece of text; once true, the answers are returned as they are.
            sampling: see `Sampling`.
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
        """Return the logits ``[B, T, V]``, fp32, of plain token ids ``[B, T]`` (no template)."""
        ids = ids.to(self.model.embed_tokens.weight.device)
        position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return self.model.logits(self.model(ids, CausalView(self.model.rotation(position)))).float()

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Be the plain base inside the block."""
        with plain_base(self.model):
            yield

    def _answers(
        self, tasks: Sequence[Task], settings: Sampling, batch_size: int
    ) -> Iterator[tuple[int, str | None]]:
        """Yield ``(task number, piece of text)``, and ``(task number, None)`` at each end."""
        prompts = [self.template.encode_prompt(self.tokenizer, *task) for task in tasks]
        answers = [_Answer(self.tokenizer, settings.stop) for _ in tasks]
        stop_ids = self.template.stop_ids(self.tokenizer)
        events = decode(self.model, prompts, settings, stop_ids, batch_size=batch_size)
        stop: bool | None = None
        while True:
            try:
                number, token = events.send(stop)
            except StopIteration:
                return
            answer = answers[number]
            piece = answer.finish() if token is None else answer.push(token)
            stop = answer.stopped if token is not None else None
            if piece:
                yield number, piece
            if token is None:
                yield number, None


class _Answer:
    """An answer's text as its tokens come; what may begin a stop text is held back."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self.decoder = StreamDecoder(tokenizer)
        self.stop, self.held, self.stopped = stop, "", False

    def push(self, token: int) -> str:
        """Return the text that is certain now."""
        return self._release(self.decoder.push(token), final=False)

    def finish(self) -> str:
        """Return the rest."""
        return "" if self.stopped else self._release(self.decoder.flush(), final=True)

    def _release(self, piece: str, *, final: bool) -> str:
        text = self.held + piece
        places = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if places:
            self.stopped, self.held = True, ""
            return text[: min(places)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return how many last characters of ``text`` could begin ``stop``."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0


def load(
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    template: str | None = None,
) -> AdaptedLlama:
    """Load an adapter on its base, or a plain base.

    Args:
        adapter: an ``adapter.safetensors``; None for the plain base.
        base: a converted base folder; by default the one the adapter names, under ``checkpoints/``.
        device: ``cpu`` or ``cuda``, which CUDA_VISIBLE_DEVICES chooses; by default CUDA where there is one.
        dtype: ``float32``, ``bfloat16`` or ``float16``; by default fp32 on a CPU with memory for it, which is
            the faster one for a text at a time, and else bf16 where the device multiplies it faster.
        template: prompt template of a plain base (``alpaca`` by default); an adapter brings its own.

    Raises:
        UserError: files that are missing, damaged, or do not belong together.
    """
    if adapter is None and base is None:
        raise UserError("give an adapter, a base, or both")
    if adapter is not None and template is not None:
        raise UserError("an adapter brings its template; leave template out")
    info, state = read_adapter(Path(adapter)) if adapter is not None else (None, {})
    folder = find_base(info.base.name) if base is None and info is not None else Path(str(base))
    if info is not None:
        check_base(info, folder, Path(str(adapter)))
    target = choose_device(device)
    tokenizer = load_tokenizer(folder)
    if dtype in (None, "auto") and target.type == "cpu" and _fits_in_fp32(folder):
        dtype = torch.float32
    model = load_base(folder, device=target, dtype=choose_dtype(dtype, target)).eval()
    check_vocabulary(tokenizer, model.config.vocab_size)
    if info is not None:
        attach(model, replace(info.adapter, dropout=0.0))
        load_adapter_state(model, state, source=str(adapter))
        model.requires_grad_(False)
    if target.type == "cpu":
        model.decode_weights = DecodeWeights(model)
    wanted = "alpaca" if template is None else template
    chosen = info.template if info is not None else resolve_template(wanted, tokenizer)
    return AdaptedLlama(model, tokenizer, chosen)


def _fits_in_fp32(folder: Path) -> bool:
    """Whether a CPU's free memory takes a base in fp32, and as much again for its cache and all else."""
    free = free_bytes(torch.device("cpu"))
    n_bytes = 4 * sum(math.prod(shape) for shape in base_shapes(read_config(folder)).values())
    return free is None or 2 * n_bytes <= free
