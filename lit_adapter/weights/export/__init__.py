"""Adapters for other programs: a folder for transformers, a GGUF file for llama.cpp and Ollama.

What merges is merged into the base's weights. A prefix does not: the folder then holds a copy of
``modeling_lit_adapter``, the one module here that imports transformers.
"""
