"""Text to token ids and back: tokenizers of every LLaMA generation, and prompt templates.

`tokenizer` is the interface, `load` chooses an implementation: `sentencepiece_model` or `huggingface`, whose
files `byte_pairs` and `gguf_vocabulary` also make of other vocabularies. `description` reads what stands
beside them. `template` turns a record into ids, `chat` renders the base's own template for it.
"""
