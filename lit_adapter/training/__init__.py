"""Training with Lightning: the module, what a run leaves behind, and the run itself.

`finetune` puts a run together, around Lightning's `trainer`. Before it: `plan` says what it will be,
`preflight` whether it fits, by the arithmetic of `memory`, `dry_run` tries three steps. Where it begins:
`start` reads an adapter, `resume` finds a checkpoint. The step: `module`, `schedule` (the learning rate),
and around it `callbacks` (validation and saving), `report`, `samples`, `notices` of what goes wrong. Several
devices: `strategy`, `sharding`, `processes`, which stop together on `signals`. What it leaves: `run_folder`,
`checkpoint`, `curves`, and the adapter files of `adapter_writer`. `lightning_internals` holds everything that
touches private parts of Lightning.
"""
