"""One cache, many slots: prompts are read into slots, and a step gives every slot its next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.generation.sampling import choose
from lit_adapter.generation.settings import Sampling
from lit_adapter.model.cache import DecodeView, KeyValueCache, PrefillView
from lit_adapter.model.cpu_decode import CpuDecode
from lit_adapter.model.llama import Llama


class NonFiniteLogitsError(UserError):
    """Logits that are not numbers: of a damaged file, or of an adapter whose training has gone wrong."""


@dataclass(eq=False)
class Slot:
    """A text being decoded."""

    number: int
    """Which prompt it answers."""
    length: int
    """Tokens in the cache."""
    n_new: int = 0
    """Tokens of the answer that the consumer has."""
    token: int = 0
    """The newest token; it is not in the cache yet."""
    under_way: int = 0
    """Tokens asked of the device and not read yet."""

    def receive(self, token: int) -> None:
        """Take the chosen token.

        Raises:
            NonFiniteLogitsError: logits that are not numbers, told by a negative token.
        """
        if token < 0:
            raise NonFiniteLogitsError(
                "the model's logits are not numbers; the base or the adapter is damaged"
            )
        self.token = token


class Decoder:
    """Runs the model on a cache and chooses tokens, a step at a time.

    Args:
        model: base with or without prefixes.
        n_slots: texts decoded together (B).
        length: longest text with its answer, in tokens.
        settings: how tokens are chosen.
    """

    def __init__(self, model: Llama, n_slots: int, length: int, settings: Sampling) -> None:
        self.model, self.settings = model, settings
        self.refill = 1
        """Free slots that make reading waiting prompts worth while."""
        self.cache = KeyValueCache(model, n_slots, length)
        self.device = model.embed_tokens.weight.device
        self._lean: CpuDecode | None = None
        self.seen: Tensor | None = None
        if settings.repetition_penalty != 1:
            shape = (n_slots, model.config.vocab_size)
            self.seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
        # A text's n-th token is drawn with the n-th number, so a seed gives it alone or in a batch.
        generator = torch.Generator().manual_seed(settings.seed)
        self.numbers = torch.rand(settings.max_new_tokens, generator=generator).to(self.device)

    def prefill(
        self, prompts: Sequence[Sequence[int]], numbers: Sequence[int], slots: Sequence[int]
    ) -> list[Slot]:
        """Read prompts into free slots and choose the first token of each.

        Args:
            prompts: token ids of each.
            numbers: which prompts they are.
            slots: their slots in the cache.
        """
        where = torch.tensor(slots, device=self.device)
        hidden = self._read(prompts, where)
        if self.seen is not None:
            for prompt, slot in zip(prompts, slots, strict=True):
                self.seen[slot] = False
                self.seen[slot, torch.tensor(prompt, device=self.device)] = True
        new = [Slot(number, len(prompt)) for number, prompt in zip(numbers, prompts, strict=True)]
        self._choose(self.model.logits(hidden), new, where)
        return new

    def _read(self, prompts: Sequence[Sequence[int]], slots: Tensor) -> Tensor:
        """Run the model on prompts, and return the hidden states ``[B, C]`` of their last tokens."""
        lengths = [len(prompt) for prompt in prompts]
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        ids = ids.to(self.device)
        position = torch.arange(ids.shape[1], device=self.device).expand_as(ids)
        view = PrefillView(self.cache, self.model.rotation(position), slots)
        last = torch.tensor(lengths, device=self.device) - 1
        if len(prompts) == 1:  # one text: the last layer computes its last position alone
            return self.model(ids, view, last)[:, 0]
        return self.model(ids, view)[torch.arange(len(prompts), device=self.device), last]

    def step(self, slots: list[Slot | None]) -> list[int]:
        """Put every slot's newest token into the cache and choose the next; idle slots idle along.

        Returns:
            The slots that have a new token.
        """
        logits = self._after(
            [slot.token if slot else 0 for slot in slots], [slot.length if slot else 0 for slot in slots]
        )
        live = [(index, slot) for index, slot in enumerate(slots) if slot]
        for _, slot in live:
            slot.length += 1
        changed = [index for index, _ in live]
        where = torch.tensor(changed, device=self.device)
        self._choose(logits[where], [slot for _, slot in live], where)
        return changed

    def _after(self, token: list[int], position: list[int]) -> Tensor:
        """Return logits ``[B, V]`` after the slots' newest tokens, which go into the cache."""
        weights = self.model.decode_weights
        if weights is not None and weights.ready:
            self._lean = self._lean or CpuDecode(self.model, self.cache)
            return self._lean.step(token, position)
        ids, place = (torch.tensor(x, device=self.device)[:, None] for x in (token, position))
        view = DecodeView(self.cache, self.model.rotation(place), place, max(position) + 1)
        return self.model.logits(self.model(ids, view)[:, 0])

    def _choose(self, logits: Tensor, slots: list[Slot], where: Tensor) -> None:
        """Choose a token for each of ``slots`` by its ``logits [B, V]``."""
        uniform = self.numbers[[slot.n_new for slot in slots]]
        seen = self.seen[where] if self.seen is not None else None
        token = choose(logits, self.settings, uniform, seen)
        if self.seen is not None:
            self.seen[where, token.clamp(min=0)] = True
        for slot, chosen in zip(slots, token.tolist(), strict=True):
            slot.receive(chosen)
