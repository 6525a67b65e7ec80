"""Triton kernels of the CUDA path.

`attention` with the gated prefix, `rows` between the products and `loss` serve training and prompts;
`decode_attention`, `decode_products` and `greedy` a decode step. `sizes` has the arithmetic of launches.
"""
