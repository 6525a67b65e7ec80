"""Prompting: `sampling` picks tokens, `decode` runs the cache, `engine` is what Python users hold."""
