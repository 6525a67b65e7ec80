"""Prompting: `adapted` is what Python users hold, `command` the script, `prompt_file` its batches.

`settings` are the choices of a generation (no torch), `adapter` is what a request is answered with, and
`sampling` chooses tokens. The `engine` answers each `request` in a `lane` of its model, on CUDA in a
`graph_lane`.
"""
