"""The model: one LLaMA, and the gated prefix that composes with it.

`config` holds the sizes (no torch), `llama` the frozen base, `rope` its positions, `attention` who may see
whom, `precision` where arithmetic is wider, `loss` the cross-entropy, `cache` keys and values while decoding.
`adapter` is the trained part and `affine` what V2 adds to it. `cpu_decode` is the CPU's path of decoding;
`fused` and `fused_decode` are the CUDA paths, on the `matrices` and the plan of `tiles`, with `kernels`. Both
devices' paths lay weights side by side by `joining`.
"""
