"""scripts/finetune.py, watched: every process writes down what it exchanged and the adapter it ends with.

$WATCHED/rank-N.json holds `exchanged`, the numbers sent by each kind of collective while training, and
`adapter`, the SHA-256 of the process's adapter.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.profiler import ProfilerActivity, profile

from lit_adapter.cli.command import run
from lit_adapter.cli.finetune import main as finetune_main


def watch(folder: Path) -> None:
    fit = pl.Trainer.fit

    def watched(trainer: pl.Trainer, module: Any, *args: Any, **kwargs: Any) -> None:
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            fit(trainer, module, *args, **kwargs)
        exchanged: Counter[str] = Counter()
        for event in seen.events():
            if event.name.startswith("gloo:"):
                exchanged[event.name] += sum(math.prod(shape) for shape in event.input_shapes)
        state = module.state_dict()
        digest = hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state)))
        found = {"exchanged": exchanged, "adapter": digest.hexdigest()}
        (folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(found))

    pl.Trainer.fit = watched


if __name__ == "__main__":
    watch(Path(os.environ["WATCHED"]))
    run(finetune_main)
