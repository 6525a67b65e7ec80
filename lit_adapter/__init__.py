"""Fine-tune LLaMA models cheaply: a frozen base and a small trained adapter (gated prefixes, norms, LoRA).

import lit_adapter
model = lit_adapter.load(adapter="out/run/adapter.safetensors")
print(model.generate("Name three colours."))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_adapter.generation.adapted import AdaptedLlama
    from lit_adapter.generation.load import load
    from lit_adapter.generation.settings import Sampling

from lit_adapter.errors import UserError

__all__ = ["AdaptedLlama", "Sampling", "UserError", "load"]
__version__ = "0.1.0"


def __dir__() -> list[str]:
    """List what `__getattr__` imports too."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import torch only when it is needed: the commands print --help without it."""
    if name == "AdaptedLlama":
        from lit_adapter.generation.adapted import AdaptedLlama

        return AdaptedLlama
    if name == "load":
        from lit_adapter.generation.load import load

        return load
    if name == "Sampling":
        from lit_adapter.generation.settings import Sampling

        return Sampling
    raise AttributeError(f"module 'lit_adapter' has no attribute '{name}'")
