"""Prompting: `sampling` picks tokens, `decode` runs the cache, `engine` is what Python users hold.

`settings` are the choices of a generation, `command` is the script's, `prompt_file` its batches.
"""
