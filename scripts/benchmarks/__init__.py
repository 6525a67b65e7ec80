"""What scripts/benchmark.py measures: our path and the libraries a user would pick instead.

`workload` makes the records, `models` the one base that all methods share, `ours` and `rivals` the
methods, `arithmetic` the floating-point operations they need, `machine` what the machine can do,
`training` and `generation` the two comparisons, `report` their files.
"""
