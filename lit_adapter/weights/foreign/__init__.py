"""Adapters of other code bases in, ours out.

`recognise` opens a file and finds its `format`: `official`, `lit` (lit-llama and litgpt), `peft` or `ours`.
"""
