"""Reading and writing files so that neither a crash nor a user's mistake destroys one.

`write` makes a file appear whole or not at all; `locks` keeps two processes from writing in one place; `read`
reports what cannot be read in one line; `paths` finds and checks names; `space` looks at the disk.
"""
