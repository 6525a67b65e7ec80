"""From files to training rows: records of instruction, input and output, and what is made of them.

`formats` reads JSON, JSONL, CSV and Parquet line by line and refuses what is malformed; `records` checks
the fields, counts what it skips, splits and compares; `hub` finds the same files in a Hub data set;
`demo` writes the embedded data set (its words in `demo_words`). None of these needs torch.
"""
