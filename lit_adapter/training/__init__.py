"""Training with Lightning: the run, step by step, and what it leaves behind.

`finetune` is the run, read from top to bottom. What it reads: `base`, `placement` (device and precision),
`initial_adapter`. What it plans: `plan`, with `schedule` (steps and learning rate), `memory`, `preflight`
(can the run work?) and `run_identity`; `resume` finds the checkpoint to start from. What it does: `fit`
trains around Lightning's `trainer`, `dry_run` tries three steps. The step: `module`, `callbacks` around it,
`notices` (warnings). Several devices: `strategy`, `sharding`, `processes`, which stop together on `signals`.
What it leaves: `run_folder`, `checkpoint`, `curves`, and the adapter files of `adapter_writer`.
"""
