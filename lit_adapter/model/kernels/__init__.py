"""Triton kernels of the CUDA path.

`attention` with the gated prefix, `rows` between the products and `loss` serve training and prompts;
`decode_attention` and `decode_products` a decode step. `sizes` has the arithmetic of launches.
"""
