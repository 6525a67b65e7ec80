"""Work on what comes with a base and may be hostile, in a process with limits on time, memory and answer.

A template or a pattern can loop for ever or fill the memory in a single call of C, where nothing in the same
process can stop it. The system's limits can.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

CPU_SECONDS = 1
"""Of processor time, so that a busy machine changes nothing. Starting the process takes 0.1."""
MEMORY_BYTES = 400 * 2**20
"""Of address space."""
ANSWER_BYTES = 2**22
WALL_SECONDS = 60
"""Only for a process that is not given a processor."""


class LimitedError(Exception):
    """The work failed, or went beyond a limit; the message says which."""


def ask(module: str, request: Any) -> Any:
    """Return what the ``module``'s work makes of a request, which is plain JSON, in a process of its own.

    Raises:
        LimitedError: the work failed, or needs more than it may.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", module],
            input=json.dumps(request).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,  # Ctrl-C is for this process, which then ends that one
            timeout=WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LimitedError(f"takes more than {WALL_SECONDS} s") from None
    if -done.returncode in (signal.SIGXCPU, signal.SIGKILL):
        raise LimitedError(f"takes more than {CPU_SECONDS} s")
    if done.returncode != 0:
        raise LimitedError(f"ends its process with status {done.returncode}")
    try:
        answer = json.loads(done.stdout)
    except ValueError:  # where SIGCHLD is ignored, the system keeps no status, and Python takes it for 0
        raise LimitedError("ends its process without an answer") from None
    if "error" in answer:
        raise LimitedError(answer["error"])
    return answer["result"]


def serve(work: Callable[[Any], Any]) -> None:
    """Answer one request on standard output, under the limits. This is the whole of a process."""
    request = json.load(sys.stdin)
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    _limit(resource.RLIMIT_CPU, CPU_SECONDS)
    _limit(resource.RLIMIT_CORE, 0)
    try:
        answer = json.dumps({"result": work(request)})
        if len(answer) > ANSWER_BYTES:
            answer = json.dumps({"error": f"gives more than {ANSWER_BYTES:,} characters"})
    except MemoryError:
        answer = json.dumps({"error": f"needs more than {MEMORY_BYTES // 2**20} MB of memory"})
    except BaseException as error:  # whatever happens here is the stranger's, and PanicException no Exception
        answer = json.dumps({"error": f"{error}"[:500] or type(error).__name__})
    sys.stdout.write(answer)


def _limit(kind: int, most: int) -> None:
    """Lower a limit of this process; one that is lower already stays."""
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))
