"""Prompts in, tokens out: one cache, many slots, and a slot is refilled as soon as its text ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.generation.sampling import choose
from lit_adapter.generation.settings import Sampling
from lit_adapter.model.cache import DecodeView, KeyValueCache, PrefillView
from lit_adapter.model.llama import Llama


@dataclass
class _Slot:
    """A text being decoded."""

    number: int
    """Which prompt it answers."""
    length: int
    """Tokens in the cache."""
    n_new: int = 0
    token: int = 0
    """The newest token; it is not in the cache yet."""
    generator: torch.Generator = field(default_factory=torch.Generator)


def check_prompt(model: Llama, prompt: Sequence[int], settings: Sampling) -> None:
    """See that prompt and answer fit the context.

    Raises:
        UserError: too long, or empty; names the numbers.
    """
    context = model.config.context_length
    if not prompt:
        raise UserError("the prompt has no token; give some text")
    if len(prompt) >= context:
        raise UserError(
            f"the prompt has {len(prompt)} tokens, but the base's context is {context}; shorten it"
        )
    if len(prompt) + settings.max_new_tokens > context:
        raise UserError(
            f"the prompt's {len(prompt)} tokens and max_new_tokens {settings.max_new_tokens} exceed the "
            f"base's context of {context}; lower max_new_tokens to {context - len(prompt)} or less"
        )


@torch.inference_mode()
def decode(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    settings: Sampling,
    stop_ids: frozenset[int],
    *,
    batch_size: int = 1,
) -> Generator[tuple[int, int | None], bool | None, None]:
    """Answer prompts, up to ``batch_size`` at a time.

    Args:
        model: base with or without prefixes.
        prompts: token ids of each prompt.
        settings: how tokens are chosen.
        stop_ids: tokens that end an answer.
        batch_size: slots of the cache.

    Yields:
        ``(prompt number, token)`` as tokens come, then ``(prompt number, None)`` once. The consumer may
        ``send(True)`` in answer to a token to end that text there.

    Raises:
        UserError: a prompt that does not fit, or logits that are not numbers.
    """
    for prompt in prompts:
        check_prompt(model, prompt, settings)
    # Longest first: prompts prefilled together are about equally long, and the last ones are short.
    waiting = deque(sorted(range(len(prompts)), key=lambda number: -len(prompts[number])))
    n_slots = min(batch_size, len(prompts))
    length = max((len(prompt) for prompt in prompts), default=0) + settings.max_new_tokens
    decoder = _Decoder(model, KeyValueCache(model, n_slots, length), settings)
    stop_ids = stop_ids | set(settings.stop_ids)
    slots: list[_Slot | None] = [None] * n_slots
    while waiting or any(slots):
        free = [index for index, slot in enumerate(slots) if slot is None][: len(waiting)]
        if free:
            numbers = [waiting.popleft() for _ in free]
            new = decoder.prefill([list(prompts[number]) for number in numbers], numbers, free)
            for index, filled in zip(free, new, strict=True):
                slots[index] = filled
            changed = free
        else:
            decoder.step(slots)
            changed = list(range(n_slots))
        for index in changed:
            slot = slots[index]
            if slot is None:
                continue
            ended = slot.token in stop_ids
            if not ended:
                slot.n_new += 1
                ended = bool((yield slot.number, slot.token)) or slot.n_new >= settings.max_new_tokens
            if ended:
                slots[index] = None
                yield slot.number, None


class _Decoder:
    """Runs the model on a cache and chooses tokens."""

    def __init__(self, model: Llama, cache: KeyValueCache, settings: Sampling) -> None:
        self.model, self.cache, self.settings = model, cache, settings
        self.device = model.embed_tokens.weight.device
        self.seen: Tensor | None = None
        if settings.repetition_penalty != 1:
            shape = (cache.n_slots, model.config.vocab_size)
            self.seen = torch.zeros(shape, dtype=torch.bool, device=self.device)

    def prefill(self, prompts: list[list[int]], numbers: list[int], slots: list[int]) -> list[_Slot]:
        """Read prompts into free slots and choose the first token of each."""
        lengths = [len(prompt) for prompt in prompts]
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        ids = ids.to(self.device)
        where = torch.tensor(slots, device=self.device)
        position = torch.arange(ids.shape[1], device=self.device).expand_as(ids)
        view = PrefillView(self.cache, self.model.rotation(position), where)
        last = torch.tensor(lengths, device=self.device) - 1
        if len(prompts) == 1:  # one text: the last layer computes its last position alone
            hidden = self.model(ids, view, last)[:, 0]
        else:
            hidden = self.model(ids, view)[torch.arange(len(prompts), device=self.device), last]
        if self.seen is not None:
            for row, slot in enumerate(slots):
                self.seen[slot] = False
                self.seen[slot, ids[row, : lengths[row]]] = True
        new = [
            _Slot(number, length, generator=torch.Generator().manual_seed(self.settings.seed))
            for number, length in zip(numbers, lengths, strict=True)
        ]
        self._choose(hidden, new, where)
        return new

    def step(self, slots: list[_Slot | None]) -> None:
        """Put every slot's newest token into the cache and choose the next; idle slots idle along."""
        ids = torch.tensor([[slot.token if slot else 0] for slot in slots], device=self.device)
        position = torch.tensor([[slot.length if slot else 0] for slot in slots], device=self.device)
        used = max(slot.length for slot in slots if slot) + 1
        view = DecodeView(self.cache, self.model.rotation(position), position, used)
        hidden = self.model(ids, view)[:, 0]
        live = [(index, slot) for index, slot in enumerate(slots) if slot]
        for _, slot in live:
            slot.length += 1
        where = torch.tensor([index for index, _ in live], device=self.device)
        self._choose(hidden[where], [slot for _, slot in live], where)

    def _choose(self, hidden: Tensor, slots: list[_Slot], where: Tensor) -> None:
        """Choose a token for each of ``slots``, whose hidden states are ``hidden [B, C]``."""
        uniform = hidden.new_zeros(len(slots))
        if not self.settings.greedy:
            uniform = torch.cat([torch.rand(1, generator=slot.generator) for slot in slots]).to(self.device)
        seen = self.seen[where] if self.seen is not None else None
        token = choose(self.model.head(hidden), self.settings, uniform, seen)
        if self.seen is not None:
            self.seen[where, token.clamp(min=0)] = True
        for slot, chosen in zip(slots, token.tolist(), strict=True):
            if chosen < 0:
                raise UserError("the model's logits are not numbers; the base or the adapter is damaged")
            slot.token = chosen
