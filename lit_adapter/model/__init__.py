"""The model: one LLaMA, what an adapter trains, and the executors that compute it.

`config` holds sizes (no torch), `layout` declares every layer, and `llama` has the modules. `attention` says
which keys a query sees, `rope` rotates, `precision` widens, `loss` is the cross-entropy. What is trained:
`parts` says what a part is; `prefix` with the forms of `gates`, `affine` and `lora` are parts; `adapter`
lists them. What computes: `executors` chooses, after a `survey` of the model; `fused` and `fused_decode` are
for CUDA, within the limits of `cuda_support`, on `matrices`, `tiles` and `kernels`; `cpu_decode` is for CPUs,
on matrices from `joining`; `cache` keeps keys and values; `graphs` captures what CUDA replays.
`torch_internals` holds everything that touches private parts of torch.
"""
