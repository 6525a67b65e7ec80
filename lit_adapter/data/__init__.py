"""From data files to packed rows.

Without torch: `sources` finds files, those of a Hub data set by `hub`; `formats` reads their rows (JSON in
`strict_json`), and `reading` makes each a `record`, of the format that `recognise` finds: a task (`tasks`), a
conversation (`conversations`) or a text. `records` counts, splits and compares them; `store` keeps them on
disk, and `streaming` reads them during training. `examples` makes token ids of a record, and `encode` of all,
in processes set up by `worker`. `demo` writes the embedded data set, whose words are in `demo_words`.

With torch: `packing` packs the records of each step into rows, in the order of `mixing`; `module` is
Lightning's data module, `stream_module` that of a stream, and `summary` describes either. `shared_starts`
packs texts whose likelihoods are asked for.
"""
