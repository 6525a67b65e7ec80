"""Prompts in, tokens out: one cache, many slots, and a slot is refilled as soon as its text ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence

import torch

from lit_adapter.errors import UserError
from lit_adapter.generation.decoder import Decoder, Slot
from lit_adapter.generation.graph_decoder import GraphDecoder
from lit_adapter.generation.settings import Sampling
from lit_adapter.model.llama import Llama


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


def check_stop_ids(model: Llama, settings: Sampling) -> None:
    """See that the ids that end an answer can come.

    Raises:
        UserError: one beyond the vocabulary.
    """
    most = max(settings.stop_ids, default=0)
    if most >= model.config.vocab_size:
        raise UserError(
            f"stop_ids holds {most}, but the base's vocabulary ends at {model.config.vocab_size - 1}"
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
        UserError: a prompt or stop id that does not fit, or logits that are not numbers.
    """
    check_stop_ids(model, settings)
    for prompt in prompts:
        check_prompt(model, prompt, settings)
    if not prompts:
        return
    # Longest first: prompts prefilled together are about equally long, and the last ones are short.
    waiting = deque(sorted(range(len(prompts)), key=lambda number: -len(prompts[number])))
    n_slots = min(batch_size, len(prompts))
    length = max(len(prompt) for prompt in prompts) + settings.max_new_tokens
    # A graph holds on to the memory of matrices, and gathered ones lie elsewhere every time.
    captured = model.embed_tokens.weight.device.type == "cuda" and not model.is_sharded
    decoder = (GraphDecoder if captured else Decoder)(model, n_slots, length, settings)
    stop_ids = stop_ids | set(settings.stop_ids)
    slots: list[Slot | None] = [None] * n_slots
    while waiting or any(slots):
        free = [index for index, slot in enumerate(slots) if slot is None][: len(waiting)]
        if waiting and len(free) >= min(decoder.refill, len(waiting)):
            numbers = [waiting.popleft() for _ in free]
            new = decoder.prefill([prompts[number] for number in numbers], numbers, free)
            for index, filled in zip(free, new, strict=True):
                slots[index] = filled
            changed = free
        else:
            changed = decoder.step(slots)
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
