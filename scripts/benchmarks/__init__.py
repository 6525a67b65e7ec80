"""What scripts/benchmark.py and its neighbours measure: this package and what a user would pick instead.

`run` leads three comparisons, `training`, `generation` and `serving` (whose `clients` ask), to their table;
`report` has their rows. `workload` makes the records, `models` the one base that all methods share;
`methods` are ours, `rivals` the others'. `arithmetic` counts the floating-point operations they need,
`machine` measures what the machine can do, `profiling` what would slow timed passes, and `savings` adds our
step's savings one by one. `peers` compares what the `families` of adapters learn from the same batches;
`frontier` what adapters of every size learn from the `courses`, which `frontier_table` and `frontier_plot`
show.
"""
