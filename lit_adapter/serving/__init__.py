"""A server for many adapters on one base, with OpenAI's interface and a chat page.

`run` starts the server: `loading` reads the models, `listening` is uvicorn's part. `app` holds its addresses.
`protocol` checks a body, `jobs` makes choices of it (`rendering` token ids of its messages), and the
`worker`, a thread, answers them in one engine. `replies` writes what it returns as OpenAI's objects. `guard`
is before all of it: keys, limits, log. `client` asks such a server, for a conversation in a terminal.
"""
