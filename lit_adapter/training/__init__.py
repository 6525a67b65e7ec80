"""Training with Lightning: the run, step by step, and what it leaves behind.

`finetune` is the run, read from top to bottom. It reads `base` and `placement` (device, precision, executor);
plans with `plan`, `length` (settings that the user has left open), `schedule` (steps and learning rate),
`memory`, `preflight` (whether the run can work) and `run_identity`; `resume` finds the checkpoint to start
from. `fit` trains with Lightning's Trainer, and `dry_run` tries three steps. The step is in `module`; around
it are `callbacks` (validation and saving), `report`, `samples`, `notices` (warnings) and `run_record`;
`ending` writes the adapter. Several devices: `strategy`, `sharding`, `processes`, which stop together on
`signals`. A run leaves `run_folder`, `checkpoint` and `curves`. `lightning_internals` holds everything that
touches private parts of Lightning.
"""
