"""The base on disk: checkpoints of others in, one plain Hugging Face folder out.

`convert` turns a source into a base folder; `huggingface`, `meta` and `gguf_file` read one format each
as a `source`, `shards` reads tensor files safely, `tensor_writer` streams them out, `output_folder`
makes a folder appear whole or not at all, `base_folder` says what a converted folder holds, `download`
fetches sources, and `cli` is the command line of the last two.
"""
