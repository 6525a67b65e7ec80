"""The base and the adapter on disk: other programs' checkpoints in, one plain Hugging Face folder out.

`convert` turns a source into a base folder. `huggingface`, `meta` and `gguf_file` each read one format as a
`source`; `shards` reads tensor files safely, `tensor_writer` streams them out, `output_folder` makes a folder
appear whole or not at all, and `base_folder` says what a converted folder holds. `load` makes a model of it,
`download` fetches sources, and `merge` merges a base and its adapter. `adapter_file` is our adapter format;
`adapter_hub` exchanges adapters with the Hub, with a `model_card`. `foreign` holds the formats of other code
bases, `plain` is an adapter independent of any format, and `measure` compares logits.
"""
