"""Text to token ids and back: tokenizers of every LLaMA generation, and prompt templates."""

from lit_adapter.text.gguf_vocabulary import write_gguf_tokenizer
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import Template, resolve_template
from lit_adapter.text.tokenizer import StreamDecoder, Tokenizer, check_vocabulary

__all__ = [
    "StreamDecoder",
    "Template",
    "Tokenizer",
    "check_vocabulary",
    "load_tokenizer",
    "resolve_template",
    "write_gguf_tokenizer",
]
