"""Triton kernels of the CUDA executors.

Training and reading prompts use `attention` with the gated prefix, `rows` between the matrix products, and
`loss`; prompts with different adapters in one row use `prompt_prefix`. Decode steps use `decode_attention`,
`decode_products` and `greedy`. All of them use `heads` on bases with head norms. The kernels of `attention`
are in `attention_forward` and `attention_gradients`, those of `decode_products` in `decode_product_kernels`.
`entry` launches kernels, `sizes` computes launch sizes.
"""
