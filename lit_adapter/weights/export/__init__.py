"""Adapters for other programs: a folder for transformers, a GGUF file for llama.cpp and Ollama.

Everything except a prefix is merged into the base's weights. With a prefix, the folder holds a copy of
``modeling_lit_adapter``, the one module here that imports transformers.
"""
