"""How much one client may ask for. No library: command lines read it before anything heavy is loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Every request beyond one of these is answered with an error that names it."""

    queue: int = 256
    """Choices that may wait for a slot; more are refused with status 429."""
    per_key: int = 64
    """Requests in progress for one key, or for one address if no keys are used."""
    max_body: int = 2 * 2**20
    """Bytes of a request's body."""
    max_headers: int = 32 * 2**10
    """Bytes of a request's headers."""
    max_tokens: int = 4096
    """Longest answer, in tokens."""
    max_messages: int = 512
    """Messages of one conversation."""
    max_choices: int = 128
    """Choices of one request: its prompts times ``n``."""
    max_n: int = 16
    """Largest ``n``."""
    max_stop: int = 16
    """Stop texts of one request."""
    stop_characters: int = 256
    """Length of a stop text."""
    receive_seconds: float = 30.0
    """Seconds in which a request, headers and body, must arrive."""
    send_seconds: float = 60.0
    """Seconds in which a client must take a part of its answer."""
    connections: int = 1024
    """Open connections."""
