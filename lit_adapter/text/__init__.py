"""Text to token ids and back: tokenizers of every LLaMA generation, and prompt templates.

`tokenizer` is the interface; `load` chooses between its implementations, `sentencepiece_model` and
`huggingface`. `byte_pairs` and `gguf_vocabulary` convert other vocabularies for these two. `description`
reads the JSON files next to a vocabulary. `template` turns a record into ids; `chat` renders the base's own
template.
"""
