"""The base and the adapter on disk: checkpoints of others in, one plain Hugging Face folder out.

`convert` turns a source into a base folder; `huggingface`, `meta` and `gguf_file` read one format each
as a `source`, `shards` reads tensor files safely, `tensor_writer` streams them out, `output_folder`
makes a folder appear whole or not at all, `base_folder` says what a converted folder holds, `load` makes a
model of it, `download` fetches sources, and `merge` makes a base of a base and its adapter. `adapter_file`
is our adapter's format, `adapter_hub` its way to and from the Hub, with a `model_card`; `foreign` holds the
formats of other code bases, with `plain` between them and ours, and `measure` compares logits.
"""
