"""Adapters of other code bases in, ours out.

`format` says what an adapter format has to do; `official`, `lit` (lit-llama and litgpt), `peft` and `ours`
do it for one each; `recognise` lists them, opens a file and finds its format; `gates` converts gate forms;
`pickles` reads torch.save files without running code; `convert` puts them together, with a report.
"""
