"""The object that Python users hold: a base with its adapter, ready to be prompted.

import lit_adapter
model = lit_adapter.load(adapter="out/run/adapter.safetensors")
print(model.generate("Name three colours."))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_adapter import arguments
from lit_adapter.generation.adapter import Adapter, attached, keep_on_host
from lit_adapter.generation.answer_text import AnswerText, pieces
from lit_adapter.generation.chatting import Said, prompt_of
from lit_adapter.generation.choosing import ScoredChoice, choose, encode_choices
from lit_adapter.generation.engine import Engine
from lit_adapter.generation.request import Request, check_batch_size
from lit_adapter.generation.settings import Sampling, check_choices
from lit_adapter.generation.task import Task, as_task, as_tasks
from lit_adapter.generation.token_ids import as_prompts, check_ids
from lit_adapter.model.attention import CausalView
from lit_adapter.model.llama import Llama
from lit_adapter.text.template import Template
from lit_adapter.text.tokenizer import Tokenizer
from lit_adapter.weights.adapter_file import check_base, read_adapter
from lit_adapter.weights.adapter_search import find_adapter


@dataclass(frozen=True, eq=False)
class Loaded:
    """What all adapters on one loaded base share."""

    folder: Path
    model: Llama  # the plain base
    engine: Engine


class AdaptedLlama:
    """A base, with or without an adapter, its tokenizer and the template it is prompted with.

    Every method may be called from several threads, on this object and on others of the same base: each
    request has its own adapter, and requests in progress at the same time are answered together. One iterator
    of `stream` belongs to one thread. A process forked after loading cannot use it, because PyTorch's threads
    do not survive a fork and a computation would wait for them forever: every method raises UserError there.
    Load the model in the forked process, or start the process with ``spawn``.

    Args:
        model: with its adapter attached, if it has one.
        tokenizer: the base's.
        template: what tasks are rendered with.
        loaded: the base that others share; None for a model whose adapter may still be trained: every call
            uses its current state.
        source: the adapter's file, if it has one.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        template: Template,
        loaded: Loaded | None = None,
        source: Path | None = None,
    ) -> None:
        self.model, self.tokenizer, self.template, self._loaded = model, tokenizer, template, loaded
        self._source = source
        self.engine = loaded.engine if loaded is not None else Engine()
        """What answers its requests, and those of all adapters on the same base."""
        self._adapter = Adapter.of(model, loaded.model) if loaded is not None else None

    def __repr__(self) -> str:
        """Return base, adapter, device and precision; a model in training has no folder and no file."""
        weight = self.model.embed_tokens.weight
        base = str(self._loaded.folder) if self._loaded is not None else None
        adapter = str(self._source) if self._source is not None else None
        dtype = str(weight.dtype).removeprefix("torch.")
        return f"AdaptedLlama({base=}, {adapter=}, device={str(weight.device)!r}, {dtype=})"

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a text generated under its template."""
        return self.template.stop_ids(self.tokenizer)

    @property
    def adapter(self) -> Adapter:
        """What its requests are answered with; of a model in training, as it is now."""
        return self._adapter or Adapter.of(self.model)

    @property
    def base_name(self) -> str:
        """The name of the base's folder."""
        return self._shared().folder.resolve().name

    @property
    def base(self) -> AdaptedLlama:
        """The plain base, prompted with the same template."""
        loaded = self._shared()
        return AdaptedLlama(loaded.model, self.tokenizer, self.template, loaded)

    def with_adapter(self, path: str | Path) -> AdaptedLlama:
        """Return the same base with another adapter, which brings its template; no weight is loaded twice.

        ``path`` is an ``adapter.safetensors`` or a run's folder.

        Raises:
            UserError: a file that is missing, damaged, or of another base; a ``path`` that is not a path.
        """
        path, loaded = find_adapter(arguments.path("path", path)), self._shared()
        info, state = read_adapter(path)
        check_base(info, loaded.folder, path)
        model = attached(loaded.model, info.adapter, state, str(path))
        return AdaptedLlama(model, self.tokenizer, info.template, loaded, path)

    def _shared(self) -> Loaded:
        self.engine.refuse_fork()
        if self._loaded is None:
            raise ValueError("only a model from `load` knows its plain base")
        return self._loaded

    def generate(self, instruction: str, input: str = "", **sampling: Any) -> str:
        """Answer one task.

        Args:
            instruction: what to do.
            input: what to do it with; empty for none.
            **sampling: any of

                - ``max_new_tokens`` (256): the longest answer, in tokens; 1 or more. Together with the prompt
                  it must fit the base's context.
                - ``temperature`` (0.0): 0 takes the most likely token (greedy); 1 samples from the model's
                  own distribution; 0 or more.
                - ``top_k`` (0): sample among the k most likely tokens; 0 or more, 0 for all.
                - ``top_p`` (1.0): sample among the most likely tokens that together reach this probability;
                  above 0, up to 1, which is off.
                - ``min_p`` (0.0): sample among tokens at least this share as likely as the most likely one;
                  from 0, which is off, to 1.
                - ``repetition_penalty`` (1.0): divide (or multiply, if negative) the logits of tokens seen
                  before; above 0, 1 is off (arXiv 1909.05858).
                - ``frequency_penalty`` (0.0): subtract this from a token's logit for each time it occurs in
                  the answer; -2 to 2.
                - ``presence_penalty`` (0.0): subtract this from the logits of tokens that occur in the
                  answer; -2 to 2.
                - ``seed`` (0): seed of the random numbers; 0 to 2**64 - 1. The same one gives the same text,
                  alone or in a batch.
                - ``stop`` (none): one text, or several, that end the answer; they are not part of it.
                - ``stop_ids`` (none): token ids that end the answer, in addition to the base's own.

        Raises:
            UserError: a value out of its range (a ValueError), or of another type or an unknown keyword
                (a TypeError too); an empty instruction; a prompt that does not fit the context; logits that
                are not finite.
        """
        return "".join(self.stream(instruction, input, **sampling))

    def stream(self, instruction: str, input: str = "", **sampling: Any) -> Iterator[str]:
        """Answer one task, piece by piece; no piece ends inside a character.

        Arguments and errors are those of `generate`.
        """
        return self._stream(self._prompts([as_task(instruction, input)]), sampling)

    def chat(
        self, messages: Iterable[Said], *, tools: Sequence[Mapping[str, Any]] | None = None, **sampling: Any
    ) -> str:
        """Answer the last message of a conversation.

        Keys and values of the conversation stay in memory: a call whose messages begin with those of an
        earlier one continues from there. `forget` frees them.

        Args:
            messages: objects with ``role`` (system, user, assistant or tool) and ``content``, as in OpenAI's
                interface; the last one is not the assistant's.
            tools: what the assistant may call, for templates that show it; None for no tools.
            **sampling: the settings of `generate`.

        Raises:
            UserError: as `generate`; a message that is malformed or that the template cannot show.
        """
        return "".join(self.stream_chat(messages, tools=tools, **sampling))

    def stream_chat(
        self, messages: Iterable[Said], *, tools: Sequence[Mapping[str, Any]] | None = None, **sampling: Any
    ) -> Iterator[str]:
        """Answer the last message of a conversation, piece by piece; see `chat`."""
        prompt = prompt_of(self.tokenizer, self.template, messages, tools)
        return self._stream([prompt], sampling, resumes=True)

    def room_for_chat(self, messages: Iterable[Said]) -> int:
        """Return how many tokens the answer to a conversation can have; 0 or less if there is no room."""
        prompt = prompt_of(self.tokenizer, self.template, messages)
        return self.model.config.context_length - len(prompt)

    def chat_batch(
        self,
        conversations: Iterable[Iterable[Said]],
        *,
        batch_size: int = 16,
        finished: Callable[[int], None] | None = None,
        stopped: Callable[[], bool] | None = None,
        **sampling: Any,
    ) -> list[str]:
        """Answer many conversations together; arguments as in `generate_batch` and `chat`."""
        encode = partial(prompt_of, self.tokenizer, self.template)
        prompts = [encode(one, name=f"conversations[{n}]") for n, one in enumerate(conversations)]
        return self.continue_batch(
            prompts, batch_size=batch_size, finished=finished, stopped=stopped, **sampling
        )

    def spare_device(self) -> None:
        """Keep in the host's memory what only likelihoods need of its adapter; they then take longer."""
        if self.adapter.model is not self.model:
            keep_on_host(self.model)

    def forget(self) -> None:
        """Free the keys and values that earlier calls of `chat` have left."""
        self.engine.forget()

    def generate_batch(
        self,
        tasks: Iterable[str | Task | Mapping[str, Any]],
        *,
        batch_size: int = 16,
        finished: Callable[[int], None] | None = None,
        stopped: Callable[[], bool] | None = None,
        enough: Callable[[int, str], bool] | None = None,
        **sampling: Any,
    ) -> list[str]:
        """Answer many tasks together.

        Args:
            tasks: each is an instruction, a pair of instruction and input, or a dict with the keys
                ``instruction`` and ``input`` (may be absent).
            batch_size: how many tasks are answered at a time; 1 or more.
            finished: a function that is called with the index of a task when its answer is complete, for a
                progress bar; None for none.
            stopped: a function without arguments that is called after every piece of text; when it returns
                true, generation ends and the answers are returned as far as they are; None for none.
            enough: a function that is called with the index of a task and its answer so far, after every
                piece of text; when it returns true, that answer ends there; None for none.
            **sampling: the settings of `generate`.

        Returns:
            The answers, in the order of ``tasks``.

        Raises:
            UserError: as `generate`; ``tasks`` is one task or holds something else (a TypeError too); a
                ``batch_size`` below 1.
        """
        return self.continue_batch(
            self._prompts(as_tasks(tasks)),
            batch_size=batch_size,
            finished=finished,
            stopped=stopped,
            enough=enough,
            **sampling,
        )

    def continue_batch(
        self,
        prompts: Iterable[Sequence[int]],
        *,
        begun: Sequence[Sequence[int]] | None = None,
        batch_size: int = 16,
        finished: Callable[[int], None] | None = None,
        stopped: Callable[[], bool] | None = None,
        enough: Callable[[int, str], bool] | None = None,
        **sampling: Any,
    ) -> list[str]:
        """Continue many texts together, without a template.

        Args:
            prompts: token ids of each text, including BOS if it should have one.
            begun: the first tokens of each answer, fewer than ``max_new_tokens``, if they are already known;
                they belong to the answer. None for none.
            batch_size: as in `generate_batch`.
            finished: as in `generate_batch`.
            stopped: as in `generate_batch`.
            enough: as in `generate_batch`.
            **sampling: the settings of `generate`.

        Returns:
            What follows each text, in the order of ``prompts``.

        Raises:
            UserError: as `generate`.
        """
        prompts = as_prompts(prompts, self.model.config)
        answers = [""] * len(prompts)
        events = self._answers(prompts, Sampling.of(**sampling), batch_size, enough=enough, begun=begun)
        for number, piece in events:
            if piece is not None:
                answers[number] += piece
            elif finished is not None:
                finished(number)
            if stopped is not None and stopped():
                break
        return answers

    def choose(self, instruction: str, input: str = "", *, choices: Sequence[str]) -> list[ScoredChoice]:
        """Return how probable each of several answers is; nothing is generated.

        Args:
            instruction: what to do.
            input: what to do it with; empty for none.
            choices: two or more different answers.

        Returns:
            The choices, the most likely one first. Each has its ``text``, its ``log_likelihood`` (the sum
            over its tokens and the token that ends an answer, in nats, without a correction for length) and
            its ``probability`` (its likelihood divided by the sum of all choices').

        Raises:
            UserError: an empty instruction; fewer than two choices, or one that is empty, repeated, too long
                or not a text.
        """
        return self.choose_batch([(instruction, input)], choices=choices)[0]

    def choose_batch(
        self,
        tasks: Iterable[str | Task | Mapping[str, Any]],
        *,
        choices: Sequence[str],
        batch_size: int = 16,
        finished: Callable[[int], None] | None = None,
    ) -> list[list[ScoredChoice]]:
        """Return for many tasks how probable each of several answers is.

        Args:
            tasks: as in `generate_batch`.
            choices: two or more different answers, the same for every task.
            batch_size: how many tasks are scored at a time; 1 or more.
            finished: a function that is called with the index of a task when it is scored; None for none.

        Returns:
            For each task, in the order of ``tasks``, what `choose` returns.

        Raises:
            UserError: as `choose`; ``tasks`` as in `generate_batch`; a ``batch_size`` below 1.
        """
        self.engine.refuse_fork()
        check_choices(choices)
        batch_size = check_batch_size(batch_size)
        context = self.model.config.context_length
        encoded = [
            encode_choices(self.tokenizer, self.template, task, choices, context) for task in as_tasks(tasks)
        ]
        return choose(self.model, encoded, choices, batch_size, finished)

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits ``[B, T, V]``, fp32, of token ids ``[B, T]`` without a template.

        Raises:
            UserError: ``ids`` is not such a tensor, is longer than the base's context, or holds an id that is
                not in the vocabulary.
        """
        self.engine.refuse_fork()
        check_ids(ids, self.model.config)
        ids = ids.to(self.model.embed_tokens.weight.device)
        position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return self.model.logits(self.model(ids, CausalView(self.model.rotation(position)))).float()

    def _prompts(self, tasks: Sequence[Task]) -> list[list[int]]:
        self.engine.refuse_fork()
        return [self.template.encode_prompt(self.tokenizer, *task) for task in tasks]

    def _stream(
        self, prompts: Sequence[Sequence[int]], sampling: dict[str, Any], *, resumes: bool = False
    ) -> Iterator[str]:
        events = self._answers(prompts, Sampling.of(**sampling), batch_size=1, resumes=resumes)
        return (piece for _, piece in events if piece)

    def _answers(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sampling,
        batch_size: int,
        *,
        resumes: bool = False,
        enough: Callable[[int, str], bool] | None = None,
        begun: Sequence[Sequence[int]] | None = None,
    ) -> Iterator[tuple[int, str | None]]:
        """Yield ``(index of the prompt, piece of text)``, and ``(index, None)`` at each end."""
        self.engine.refuse_fork()
        adapter, stop_ids = self.adapter, self.stop_ids
        starts = [()] * len(prompts) if begun is None else begun
        requests = [
            Request([*prompt, *start], settings.after(len(start)), adapter, stop_ids, resumes)
            for prompt, start in zip(prompts, starts, strict=True)
        ]
        answers = [AnswerText(self.tokenizer, settings.stop, start) for start in starts]
        yield from pieces(self.engine, requests, answers, batch_size, enough)
