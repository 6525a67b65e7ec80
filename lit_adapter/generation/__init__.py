"""Prompting: `engine` is for Python users, `answering` for the command line, `prompt_file` for files.

`settings` are the choices of a generation (no torch), `sampling` picks tokens by them. `decode` fills and
refills the slots of a batch; `decoder` runs their steps, and `graph_decoder` does so on CUDA.
"""
