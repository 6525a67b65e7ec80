"""Text to token ids and back: tokenizers of every LLaMA generation, and prompt templates.

`tokenizer` is the interface; `load` chooses between its implementations, `sentencepiece_model` and
`huggingface`. `byte_pairs` and `gguf_vocabulary` convert other vocabularies for these two. `description`
reads the JSON files next to a vocabulary. `template` turns a record into ids; `chat` has the base's own
template rendered by `chat_rendering`; `conversation` has several turns rendered, with `protection` of users'
texts. Rendering, `pattern_trial` of a tokenizer's regular expressions and `growth_trial` of its replacements
run in a process with limits (`limited`).
"""
