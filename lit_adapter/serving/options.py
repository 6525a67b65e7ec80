"""The settings of a server. No heavy library: command lines read it before anything is loaded."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from lit_adapter.errors import UserError
from lit_adapter.serving.limits import Limits


@dataclass(frozen=True)
class ServerOptions:
    """What a server serves, where, and to whom."""

    adapters: dict[str, Path] = field(default_factory=dict)
    """Files of adapters by name."""
    folder: Path | None = None
    """A folder of more adapters, which is watched."""
    base: Path | None = None
    """The base; by default the one that the first adapter names."""
    template: str | None = None
    """Prompt template of the plain base; by default its own chat template if it has one, else alpaca."""
    device: str | None = None
    dtype: str | None = None
    verify: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    slots: int = 32
    """Answers generated at a time."""
    context: int | None = None
    """Longest prompt plus answer, in tokens; by default what the base and half the free memory allow, or on a
    CPU 4 GiB."""
    api_keys: Path | None = None
    insecure: bool = False
    """Serve an address that other machines can reach without keys."""
    cors: tuple[str, ...] = ()
    """Origins whose web pages may send requests."""
    grace: float = 30.0
    """Seconds that answers may take to finish after SIGTERM."""
    log_prompts: bool = False
    ready_file: Path | None = None
    """A file that exists while requests are answered."""
    limits: Limits = field(default_factory=Limits)

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    def check(self) -> None:
        """Refuse settings that do not go together.

        Raises:
            UserError: they do not.
        """
        if not self.adapters and self.base is None and self.folder is None:
            raise UserError("give --base FOLDER, or adapters with --adapter NAME=FILE or --adapters FOLDER")
        if not self.is_local and self.api_keys is None and not self.insecure:
            raise UserError(
                f"--host {self.host} can be reached from elsewhere; give --api-keys FILE, or --insecure if "
                "everybody there may use this server"
            )
        if self.insecure and (self.is_local or self.api_keys is not None):
            raise UserError("--insecure has no meaning for this address, or with --api-keys; leave it out")
        if not 0 <= self.port < 65536:
            raise UserError(f"--port is {self.port}; expected 0 (any free one) to 65535")
        for origin in self.cors:
            if origin == "*" or "://" not in origin or origin.endswith("/"):
                raise UserError(f"--cors {origin}: expected an origin such as https://chat.example.org")
