"""Adapters of other code bases in, ours out.

`official`, `lit` (lit-llama and litgpt) and `peft` map one format each between its own tensors and our names,
as pure dict to dict; `gates` turns one form of gate into another; `pickles` looks through torch.save files;
`recognise` tells the formats apart; `convert` puts them together, with a report.
"""
