"""What adapters have learned, beside their base.

`evaluate` is an evaluation from its `settings` to its folder. `contestants` are its models; `on_records`
gives them held-out records and keeps their answers in the `answer_file`. `metrics` score answers
(`json_start` tells which cannot become right, `own_metric` calls a user's function), `labels` those of
classification, and `statistics` says how certain the means of `scores` are. `tasks` are
lm-evaluation-harness's, which asks through `harness` and `conversation`; `windows` measures plain text.
`report` writes `tables`, `plots` and `samples` into a `page` with its `style`, and the `history` of the runs;
`terminal` shows the same in short.
"""
