"""The run folder by itself: what is set aside, and who may have the folder."""

from __future__ import annotations

from pathlib import Path

from lit_adapter.training.run_folder import RunFolder


def test_nothing_that_was_set_aside_is_replaced(tmp_path: Path) -> None:
    """Three branches from step 4, each with a step 8 of its own."""
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    lines: list[str] = []
    for content in ("first", "second", "third"):
        folder.checkpoint_path(4).write_text("start")
        folder.checkpoint_path(8).write_text(content)
        folder.set_aside(4, lines.append)
    found = {path.name: path.read_text() for path in folder.checkpoints.iterdir()}
    assert found == {
        "step-0000004.ckpt": "start",
        "step-0000008.aside": "first",
        "step-0000008-2.aside": "second",
        "step-0000008-3.aside": "third",
    }
    assert [line.rpartition(" ")[2] for line in lines] == [
        "step-0000008.aside",
        "step-0000008-2.aside",
        "step-0000008-3.aside",
    ]
