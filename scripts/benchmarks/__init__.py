"""What scripts/benchmark.py and its neighbours measure: this package and what a user would pick instead.

`run` leads the two comparisons, `training` and `generation`, from options to table, with their `report`.
`workload` makes the records, `models` the one base that all methods share; `methods` are ours, `rivals` the
others'. `arithmetic` counts the floating-point operations they need, `machine` measures what the machine can
do. `savings` adds our step's savings one by one; `learning` compares what the `families` of adapters learn.
"""
