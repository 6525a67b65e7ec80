"""Training with Lightning: the module, what a run leaves behind, and the run itself.

`module` holds the step, `schedule` the learning rate, `checkpoint` durable checkpoint files, `run_folder`
a run's files and its identity, `resume` where a run goes on, `signals` and `processes` how it stops,
`callbacks` what happens around a step, `notices` words of warning, `finetune` puts them together.
"""
