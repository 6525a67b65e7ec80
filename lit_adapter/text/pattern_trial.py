"""Tries a tokenizer's regular expressions on texts that make a bad one backtrack, in a limited process."""

from __future__ import annotations

import re
from itertools import product

from tokenizers import Regex, pre_tokenizers

from lit_adapter.text.limited import serve

COMMON = 'aAz0 \n\t_.!"<\u00e9\u4e00'
"""Characters of every class that patterns use."""
SHORT, LONG = 40, 1000
"""Repeats: enough to notice time that doubles with every character, and time that grows with the cube."""


def try_patterns(patterns: list[str]) -> None:
    """Split texts by every pattern; one that takes too long, or that the library gives up on, fails."""
    for pattern in patterns:
        splitter = pre_tokenizers.Split(Regex(pattern), "isolated")
        letters = dict.fromkeys([*COMMON, *pattern[:200]])
        words = dict.fromkeys(re.findall(r"\w{2,}", pattern[:200]))
        ends = (
            "",
            "!",
            "a",
            " ",
            "\n",
            "!" + "".join(letters),
        )  # the last one has the end that a match needs
        for word, end in product([*letters, *words], ends):
            splitter.pre_tokenize_str(word * SHORT + end)
        for letter in letters:
            splitter.pre_tokenize_str(letter * LONG + "!")


if __name__ == "__main__":
    serve(try_patterns)
