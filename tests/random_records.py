"""Random encoded records, for the packing tests."""

from __future__ import annotations

import numpy as np

from lit_adapter.data.encode import Encoded, kinds_of_tasks

HEADS = (np.arange(20, 26), np.arange(30, 37))  # what each of the template's two texts starts with


def encoded(
    seed: int, n_records: int = 9, *, cut: bool = False, longest: int = 12, vocab: int = 61
) -> Encoded:
    """Records of uneven length, two variants, some with an answer of one token, some truncated."""
    draw = np.random.default_rng(seed)
    ids, n_prompt, variant, whole = [], [], [], []
    for index in range(n_records):
        kind = int(draw.integers(2))
        prompt = np.concatenate([HEADS[kind], draw.integers(2, vocab, draw.integers(0, longest))])
        answer = draw.integers(2, vocab, 1 if index % 3 == 0 else draw.integers(1, longest))
        shortened = cut and index % 4 == 1
        prompt = prompt[draw.integers(1, len(prompt)) :] if shortened else prompt
        ids.append(np.concatenate([prompt, answer]))
        n_prompt.append(len(prompt))
        variant.append(kind)
        whole.append(not shortened)
    return Encoded(
        ids=np.concatenate(ids).astype(np.int32),
        start=np.cumsum([0, *map(len, ids)]).astype(np.int64),
        kinds=kinds_of_tasks(np.array([*map(len, ids)]), np.array(n_prompt)),
        n_prompt=np.array(n_prompt, np.int32),
        variant=np.array(variant, np.int8),
        whole=np.array(whole),
        source_row=np.arange(n_records, dtype=np.int32),
    )
