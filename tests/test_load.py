"""Loading a converted base: what it costs in memory, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convert_sources import random_llama, write_hf
from safetensors.torch import load_file, save_file
from warm_runs import run_code

from lit_adapter.errors import UserError
from lit_adapter.weights.convert import convert
from lit_adapter.weights.load import load_base

ANONYMOUS = """
import sys
from pathlib import Path
import torch
from lit_adapter.weights.load import load_base

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

small, large, dtype = sys.argv[1:]
load_base(Path(small), device="cpu", dtype=torch.float32)  # libraries are loaded and warm
before = anonymous()
model = load_base(Path(large), device="cpu", dtype=getattr(torch, dtype))
print(anonymous() - before)
"""


@pytest.mark.slow
def test_a_base_is_loaded_without_the_compiler(tiny_base: Path) -> None:
    """Importing it takes longer than reading a base of 135M."""
    code = (
        "import sys, torch; from pathlib import Path; from lit_adapter.weights.load import load_base\n"
        f"load_base(Path({str(tiny_base)!r}), device='cpu', dtype=torch.bfloat16)\n"
        "print([name for name in ('torch._dynamo', 'sympy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted base of 34 million weights in fp32."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    model = random_llama(**sizes, num_attention_heads=8, num_key_value_heads=8)
    return convert(write_hf(model, folder / "source"), folder / "base")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure memory")
@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.05), ("bfloat16", 0.6)])
def test_a_base_is_mapped_not_copied(tiny_base: Path, large: Path, dtype: str, share: float) -> None:
    """In its stored precision a base costs no memory of its own; cast to half the width, half its size."""
    done = run_code(ANONYMOUS, tiny_base, large, dtype)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < share * (large / "model.safetensors").stat().st_size


def changed(tiny_base: Path, out: Path, **tensors: torch.Tensor | None) -> Path:
    """Copy a base with tensors replaced, added, or (None) left out."""
    shutil.copytree(tiny_base, out)
    state = load_file(out / "model.safetensors") | {name.replace("__", "."): t for name, t in tensors.items()}
    save_file({name: t for name, t in state.items() if t is not None}, out / "model.safetensors")
    return out


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model__norm__weight": None}, r"1 tensors are missing, first model\.norm\.weight"),
        (
            {"model__norm__weight": torch.ones(3)},
            r"model\.norm\.weight has shape \[3\]; config.json asks for \[48\]",
        ),
        ({"surprise": torch.ones(3)}, "unexpected tensor surprise"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tiny_base: Path, tmp_path: Path, tensors: dict[str, torch.Tensor | None], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_base(changed(tiny_base, tmp_path / "changed", **tensors), device="cpu", dtype=torch.float32)


def test_a_cut_file_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    out = changed(tiny_base, tmp_path / "cut")
    content = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read"):
        load_base(out, device="cpu", dtype=torch.float32)


def test_a_folder_that_was_not_converted_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="model_type is 'gpt2'"):
        load_base(tmp_path, device="cpu", dtype=torch.float32)


def test_an_adapter_in_the_folder_of_its_base_is_not_taken_for_the_base(
    tiny_base: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    save_file({"layers.0.self_attn.prefix.prompt": torch.zeros(2, 4)}, folder / "adapter.safetensors")
    wanted = load_base(tiny_base, device="cpu", dtype=torch.float32).state_dict()
    found = load_base(folder, device="cpu", dtype=torch.float32).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
