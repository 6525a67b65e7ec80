"""Triton kernels of the CUDA path: `attention` with the gated prefix, `rows` between products, `loss`."""
