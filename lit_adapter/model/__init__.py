"""The model: one LLaMA, and the gated prefix that composes with it.

`config` holds the sizes (no torch), `llama` the frozen base, `rope` its positions, `attention` who may
see whom, `adapter` the trained part and `affine` what V2 adds to it, `cache` keys and values while
decoding.
"""
