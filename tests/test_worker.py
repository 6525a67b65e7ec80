"""A worker process whose parent is killed says nothing of its own: the run has named what was killed."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

WORKER = """
import sys
from multiprocessing import resource_sharer
from lit_adapter.data.worker import follow_parent
follow_parent()
print(resource_sharer.DupFd(1)._id[0], flush=True)
sys.stdin.readline()
{last}
"""


def start(last: str = "") -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", WORKER.format(last=last)]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_a_parent_that_dies_while_it_takes_a_tensor_causes_no_traceback() -> None:
    """A loader's tensor is a file descriptor, which its parent fetches over a socket."""
    with start() as worker:
        assert worker.stdout is not None
        address = worker.stdout.readline().strip()
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as parent:
                parent.connect(address)
                parent.recv(1)  # and the rest stays unread: the connection is reset
        assert worker.communicate("\n", timeout=60) == ("", "")


@pytest.mark.parametrize("error", ["ValueError", "ConnectionError"])
def test_any_other_error_of_a_worker_is_shown(error: str) -> None:
    with start(last=f"raise {error}('seen')") as worker:
        assert f"{error}: seen" in worker.communicate("\n", timeout=60)[1]
