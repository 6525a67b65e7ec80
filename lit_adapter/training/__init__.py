"""Training with Lightning: the module, what a run leaves behind, and the run itself.

`module` holds the step, `schedule` the learning rate, `checkpoint` durable checkpoint files, `run_folder`
a run's files and its identity, `report` curves and lines, `finetune` puts them together.
"""
