"""Triton kernels of the CUDA executors.

Training and reading prompts use `attention` with the gated prefix, `rows` between the matrix products, and
`loss`. Decode steps use `decode_attention`, `decode_products` and `greedy`. `sizes` computes launch sizes.
"""
