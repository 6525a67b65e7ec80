"""What scripts/benchmark.py and its neighbours measure: our path and what a user would pick instead.

`run` is the two comparisons from options to table, `training` and `generation`, with their `report`.
`workload` makes the records, `models` the one base that all methods share; `methods` are ours, `rivals` the
others'. `arithmetic` counts the floating-point operations they need, `machine` says what the machine can do.
`savings` takes our step's savings one by one; `learning` compares what the `families` of adapters learn.
"""
