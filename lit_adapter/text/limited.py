"""Work on parts of a base that may be hostile, in a process with limits on time, memory and output.

A template or a pattern can loop forever or exhaust memory in a single call of C, where nothing in the same
process can stop it. The system's limits can.
"""

from __future__ import annotations

import json
import math
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

CPU_SECONDS = 1
"""Processor time for each request, so that a busy machine changes nothing. Starting takes 0.1."""
MEMORY_BYTES = 400 * 2**20
"""Bytes of address space."""
ANSWER_BYTES = 2**22
WALL_SECONDS = 60
"""Wall-clock limit, for a process that gets no processor time."""


class LimitedError(Exception):
    """The work failed, or went beyond a limit; the message says which."""


def ask(module: str, request: Any) -> Any:
    """Return the result of the ``module``'s work on a request (plain JSON), in a process of its own.

    Raises:
        LimitedError: the work failed, or exceeded a limit.
    """
    process = _start(module)
    try:
        answer, _ = process.communicate(_line(request), timeout=WALL_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise LimitedError(f"takes more than {WALL_SECONDS} s") from None
    return _result(answer, process.returncode)


class LimitedProcess:
    """A process that answers many requests one after another, each under the limits; for several threads.

    It starts with the first request, and again after one that it did not survive, or in a process forked from
    this one. It ends with this process.

    Args:
        module: whose work it does.
    """

    def __init__(self, module: str) -> None:
        self.module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def ask(self, request: Any) -> Any:
        """Return the result of the work on a request, which is plain JSON.

        Raises:
            LimitedError: the work failed, or exceeded a limit.
        """
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                self._process, self._owner = _start(self.module), os.getpid()
            process, self._process = self._process, None  # an interrupt would leave an answer unread
            try:
                answer = _exchange(process, _line(request))
            except BaseException:
                process.kill()
                process.communicate()
                raise
            if answer.endswith(b"\n"):
                self._process = process
            else:
                process.communicate()
        return _result(answer, process.returncode or 0)


def _start(module: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "false"},
        start_new_session=True,  # Ctrl-C is for this process, which then ends that one
    )


def _line(request: Any) -> bytes:
    return json.dumps(request).encode() + b"\n"


def _exchange(process: subprocess.Popen[bytes], line: bytes) -> bytes:
    """Return the line that a process answers; one without its end if the process has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    answer, end = b"", time.monotonic() + WALL_SECONDS
    try:
        process.stdin.write(line)
        process.stdin.flush()
    except BrokenPipeError:
        return answer
    while not answer.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            raise LimitedError(f"takes more than {WALL_SECONDS} s")
        part = os.read(process.stdout.fileno(), 2**20)
        if not part:
            break
        answer += part
    return answer


def _result(answer: bytes, status: int) -> Any:
    if -status in (signal.SIGXCPU, signal.SIGKILL):
        raise LimitedError(f"takes more than {CPU_SECONDS} s")
    if status != 0:
        raise LimitedError(f"ends its process with status {status}")
    try:
        found = json.loads(answer)
    except ValueError:  # where SIGCHLD is ignored, the system keeps no status, and Python takes it for 0
        raise LimitedError("ends its process without an answer") from None
    if "error" in found:
        raise LimitedError(found["error"])
    return found["result"]


def serve(work: Callable[[Any], Any]) -> None:
    """Answer each request on standard input, a line, with a line. This is the whole of a process."""
    requests = iter(sys.stdin.buffer)
    for number, line in enumerate(requests):
        request = json.loads(line)
        if number == 0:
            _limit(resource.RLIMIT_AS, MEMORY_BYTES)
            _limit(resource.RLIMIT_CORE, 0)
        _allow_seconds()
        sys.stdout.write(_answer(work, request) + "\n")
        sys.stdout.flush()


def _answer(work: Callable[[Any], Any], request: Any) -> str:
    try:
        answer = json.dumps({"result": work(request)})
    except MemoryError:
        return json.dumps({"error": f"needs more than {MEMORY_BYTES // 2**20} MB of memory"})
    except BaseException as error:  # a failure here is the stranger's; a PanicException is no Exception
        return json.dumps({"error": f"{error}"[:500] or type(error).__name__})
    if len(answer) > ANSWER_BYTES:
        return json.dumps({"error": f"gives more than {ANSWER_BYTES:,} characters"})
    return answer


def _allow_seconds() -> None:
    """Let this process compute for `CPU_SECONDS` more; the system counts whole seconds."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + CPU_SECONDS), for_good=False)


def _limit(kind: int, most: int, *, for_good: bool = True) -> None:
    """Lower a limit of this process, ``for_good`` or until the next call; one that is lower already stays."""
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most if for_good else hard))
