"""Prompting, one request or many.

`load` returns the object that Python users hold, `adapted`; `answering` serves the command line,
`prompt_file` its files and `repeats` its comparisons; `terminal` holds a conversation with a partner, such as
`loaded_models`. `task` and `token_ids` read the arguments of Python callers. `settings` are the choices of a
request (no torch), `adapter` is the adapter that answers it, `sampling` chooses tokens. The `engine` answers
every `request` in the `lane` of its model, on CUDA a `graph_lane`. `choosing` and `prompt_likelihood` give
the likelihoods of given texts; `answer_text` makes text of tokens, up to a stop text.
"""
