"""Faults 51 to 58: configuration files, options, and the run folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from bench import Bench, Outcome, Row


def options(*given: object) -> Callable[[Bench], Outcome]:
    return lambda bench: bench.finetune(*given)


def config(text: str) -> Callable[[Bench], Outcome]:
    """Fine-tune with a second configuration file of this content."""
    return lambda bench: bench.finetune("--config", bench.file("c.yaml", text))


def used_folder(bench: Bench) -> Outcome:
    bench.file("run/notes.txt", "mine")
    return bench.finetune()


def folder_is_a_file(bench: Bench) -> Outcome:
    bench.file("run", "mine")
    return bench.finetune()


def output_in_the_source(bench: Bench) -> Outcome:
    source = bench.file("source/config.json", {}).parent
    return bench.convert(source, "--out", source / "converted")


def living_lock(bench: Bench) -> Outcome:
    """A living process has the folder's lock."""
    lock = bench.file("run/.lock", "")
    code = (
        "import fcntl, os, sys; file = open(sys.argv[1], 'r+'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print(os.getpid(), file=file, end='', flush=True); print(flush=True); input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], **pipes) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdout.readline()
        outcome = bench.finetune()
        other.stdin.close()
    return outcome


def dead_lock(bench: Bench) -> Outcome:
    """The folder's lock names a process that is gone: the next mistake is reached."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    bench.file("run/.lock", str(done.pid))
    outcome = bench.finetune("--optim.batch_size", 64)
    bench.before.pop(bench.out / ".lock")
    return outcome


BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(20)
)

ROWS = [
    Row(51, "unknown key", config("optim:\n  lrr: 1\n"), r"c\.yaml:2: unknown key 'optim.lrr'; did you mean"),
    Row(51, "wrong type", config("optim:\n  lr: fast\n"), r"optim.lr is 'fast'; expected a number or null"),
    Row(51, "section as number", config("optim: 5\n"), r"c\.yaml:1: 'optim' must hold keys such as"),
    Row(
        51, "misspelt option", options("--trainer.devicse", 2), r"unknown option '--trainer.devicse'; did you"
    ),
    Row(52, "key twice", config("seed: 1\nseed: 2\n"), r"c\.yaml:2: key 'seed' is given twice; keep one"),
    Row(53, "bomb of aliases", config(BOMB), r"c\.yaml:1: unknown key 'a'"),
    Row(53, "alias in a value", config("data: &d\n  train: *d\n"), r"c\.yaml"),
    Row(53, "tab", config("optim:\n\tlr: 1\n"), r"c\.yaml:2: not valid YAML"),
    Row(
        53,
        "python object",
        config("seed: !!python/name:os.getcwd\n"),
        r"c\.yaml:1: not valid YAML: .* the tag",
    ),
    Row(
        53, "class path", config("trainer:\n  class_path: os.system\n"), r"c\.yaml:2: unknown key 'trainer.cl"
    ),
    Row(54, "too many layers", options("--adapter.layers", 5), r"adapter.layers is 5; the base has 4 layers"),
    Row(54, "no layers", options("--adapter.layers", 0), r"adapter.layers is 0; expected 1 or more"),
    Row(54, "no prompt", options("--adapter.prompt_length", 0), r"adapter.prompt_length is 0; expected 1"),
    Row(
        54,
        "negative rate",
        options("--optim.lr=-1"),
        r"optim.lr is -1.*; expected a finite number, 0 or more",
    ),
    Row(54, "rate nan", options("--optim.lr", ".nan"), r"optim.lr is nan; expected a finite number"),
    Row(
        54,
        "long warm-up",
        options("--optim.warmup", 99),
        r"optim.warmup is 99 steps, longer than the run of 15",
    ),
    Row(
        54,
        "beyond the context",
        options("--data.max_length", 1025),
        r"is 1025, but the base's context is 1024",
    ),
    Row(54, "empty batch", options("--optim.batch_size", 0), r"optim.batch_size is 0; expected 1 or more"),
    Row(
        55, "too many devices", options("--trainer.devices", 999), r"devices is 999, but this machine has \d+"
    ),
    Row(
        55,
        "no such device",
        options("--trainer.accelerator", "cuda:9"),
        r"'cuda:9'; expected one of auto, cpu",
    ),
    Row(56, "16-true", options("--trainer.precision", "16-true"), r"16-true; fp16 gradients underflow"),
    Row(56, "16-mixed", options("--trainer.precision", "16-mixed"), r"16-mixed, which needs a GPU; use"),
    Row(57, "folder in use", used_folder, r"run: holds files, but no run; choose another --out"),
    Row(57, "folder is a file", folder_is_a_file, r"run: is a file; choose another run folder with --out"),
    Row(57, "output in the source", output_in_the_source, r"lies inside the source .*; choose another --out"),
    Row(58, "folder of a living run", living_lock, r"run: in use by process \d+; wait for it, or choose"),
    Row(58, "folder of a dead run", dead_lock, r"optim.batch_size is 64, but there are only 40"),
]
