"""From files to training rows: records of instruction, input and output, and what is made of them.

Without torch: `formats` reads JSON, JSONL, CSV and Parquet line by line and refuses what is malformed;
`records` checks the fields, counts what it skips, splits and compares; `hub` finds the same files in a Hub
data set; `encode` tokenizes them, in processes that keep to `worker`; `demo` writes the embedded data set
(its words are in `demo_words`). With torch: `packing` lays steps into rows, `module` is Lightning's data
module, and `summary` says what it holds.
"""
