"""Triton kernels of the CUDA executors.

Training and reading prompts use `attention` with the gated prefix, `rows` between the matrix products, and
`loss`. Decode steps use `decode_attention`, `decode_products` and `greedy`. The kernels of `attention` are
in `attention_forward` and `attention_gradients`, those of `decode_products` in `decode_product_kernels`.
`entry` launches kernels, `sizes` computes launch sizes.
"""
