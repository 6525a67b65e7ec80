"""Prompting: `engine` is what Python users hold, `command` the script, `prompt_file` its batches.

`settings` are the choices of a generation (no torch), `sampling` picks tokens by them. `decode` fills and
refills the slots of a batch; `decoder` runs their steps, and `graph_decoder` does so on CUDA.
"""
