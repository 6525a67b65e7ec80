"""Loading the tokenizer that a folder contains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lit_adapter.errors import UserError
from lit_adapter.files.read import read_object, reading, refuse_stand_in
from lit_adapter.text.byte_pairs import LLAMA3_STOPS, llama3_json, looks_like_ranks
from lit_adapter.text.description import read_description
from lit_adapter.text.huggingface import HuggingFaceTokenizer
from lit_adapter.text.sentencepiece_model import SentencePieceTokenizer
from lit_adapter.text.tokenizer import Tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a model folder.

    ``tokenizer.json`` takes precedence over ``tokenizer.model``: only it contains tokens added later.

    Raises:
        UserError: there is no tokenizer, or its file is empty, damaged or of an unknown kind.
    """
    found = [path for name in ("tokenizer.json", "tokenizer.model") if (path := folder / name).exists()]
    if not found:
        raise UserError(
            f"{folder}: no tokenizer.json or tokenizer.model there; expected the folder of a converted base"
        )
    path = found[0]
    with reading(path):
        refuse_stand_in(path)
        content = path.read_bytes()
    about = read_description(folder)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(read_object(path), about, path)
    if not looks_like_ranks(content):
        return SentencePieceTokenizer(content, about, path)
    about = replace(about, eos=about.eos or LLAMA3_STOPS[0])
    tokenizer = HuggingFaceTokenizer(llama3_json(content, path), about, path)
    # Meta's files do not list the tokens that end a turn.
    tokenizer.stop_ids |= {tokenizer.control_tokens[stop] for stop in LLAMA3_STOPS}
    return tokenizer
