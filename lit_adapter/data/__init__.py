"""From data files to packed rows.

Without torch: `formats` reads JSON, JSONL, CSV, TSV and Parquet files and refuses malformed ones (JSON in
`strict_json`); `records` checks, counts, splits and compares records of instruction, input and output; `hub`
finds the same files in a Hub data set; `store` keeps records on disk, not in memory; `encode` tokenizes them,
in processes set up by `worker`; `demo` writes the embedded data set, whose words are in `demo_words`. With
torch: `packing` packs the records of each step into rows, `module` is Lightning's data module, and `summary`
describes it.
"""
