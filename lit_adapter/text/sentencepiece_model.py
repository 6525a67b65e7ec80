"""The sentencepiece ``tokenizer.model`` of LLaMA 1 and 2."""

from __future__ import annotations

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined] # made at run time

from lit_adapter.errors import UserError
from lit_adapter.text.description import Description, describe
from lit_adapter.text.tokenizer import CONTROL_SPELLING, Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""Types of pieces in sentencepiece's numbering, which GGUF files have too."""


class SentencePieceTokenizer(Tokenizer):
    """A serialised sentencepiece model; tokens that other files add to it are control tokens.

    Raises:
        UserError: it is not a sentencepiece model, or lacks a token that ``about`` names.
    """

    def __init__(self, content: bytes, about: Description, source: object) -> None:
        model = _parse(content, source)
        size = len(model.pieces)
        _mark_control_tokens(model, about)
        self.control_tokens = {p.piece: i for i, p in enumerate(model.pieces) if p.type == CONTROL}
        self.control_tokens |= {text: id_ for text, id_ in about.added.items() if id_ >= size}
        self.vocab_size = max([size, *(id_ + 1 for id_ in self.control_tokens.values())])
        self._size = size
        self._processor = _processor(model, source)
        self.strips_space = bool(model.normalizer_spec.add_dummy_prefix)
        self.space_after_control = self.strips_space and about.legacy
        model.normalizer_spec.add_dummy_prefix = False
        self._continuing = _processor(model, source)
        own = self._processor.bos_id(), self._processor.eos_id()
        bos_id, eos_id = (id_ if id_ >= 0 else None for id_ in own)
        describe(self, about, bos_id=bos_id, eos_id=eos_id, add_bos=bos_id is not None, source=source)

    def _encode_text(self, text: str, continuation: bool) -> list[int]:
        return (self._continuing if continuation else self._processor).encode(text)

    def piece(self, token: int) -> bytes:
        """Return a token's bytes; none for control tokens and unused ids."""
        processor = self._processor
        if not 0 <= token < self._size or processor.is_control(token) or processor.is_unused(token):
            return b""
        if processor.is_unknown(token):
            return processor.decode([token]).encode()
        text = processor.id_to_piece(token)
        if processor.is_byte(token):
            return bytes.fromhex(text[3:5])
        return text.replace("\u2581", " ").encode()


def _parse(content: bytes, source: object) -> ModelProto:
    try:
        size = sentencepiece.SentencePieceProcessor(model_proto=content).vocab_size()
    except RuntimeError as error:
        what = str(error).partition("]")[2].strip() or "unknown format"
        raise UserError(
            f"{source}: neither a sentencepiece model nor LLaMA 3's list of ranks ({what}); download it again"
        ) from None
    if not size:
        raise UserError(f"{source}: a sentencepiece model without pieces; download it again")
    return ModelProto.FromString(content)


def _processor(model: ModelProto, source: object) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    except RuntimeError as error:
        raise UserError(f"{source}: sentencepiece refuses this model: {error}") from None


def _mark_control_tokens(model: ModelProto, about: Description) -> None:
    """Give the type CONTROL to tokens that act as control tokens: BOS, EOS, special pieces, ``<|...|>``."""
    named = {about.bos, about.eos, *about.special}
    for piece in model.pieces:
        told = piece.piece in named and piece.type in (NORMAL, USER_DEFINED)
        looks = piece.type == USER_DEFINED and CONTROL_SPELLING.fullmatch(piece.piece)
        if told or looks:
            piece.type = CONTROL
