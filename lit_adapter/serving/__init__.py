"""A server for many adapters on one base, with OpenAI's interface and a chat page.

`run` starts the server: `loading` reads the models, `listening` is uvicorn's part. `app` holds its addresses.
`protocol` checks a body, `jobs` turns it into choices (`rendering` turns messages into token ids), and the
`worker`, a thread, answers them in one engine. `replies` turns its events into OpenAI's objects. `guard`
comes before all of this: keys, limits, log. `client` talks to such a server, for a conversation in a
terminal.
"""
