"""What Adapter V2 trains beside prompts and gates (arXiv 2304.15010): norms, and a bias and scale per linear.

    linear   y = s * (W x + b)     b = 0 and s = 1 at the start; W and its own bias stay frozen
    norm     y = w * x / rms(x)    w starts as the frozen norm's weight, which stays as it is

Both take the place of the module they adapt and hold its frozen tensors under the same names, so that
the model and the base's files know nothing of them. Trained tensors are fp32 under every precision.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapter.model.config import LlamaConfig
from lit_adapter.model.llama import Llama, RMSNorm


class AdaptedLinear(nn.Module):
    """A frozen linear layer with a trained bias and scale on each of its outputs."""

    bias: nn.Parameter | None
    outputs = slice(None)
    """The outputs that this process computes, all of them unless they are cut over several."""
    bias_share = 1.0
    """0 where another process, whose result is added to this one's, adds the bias."""

    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__()
        self.active = True
        """Off, it is the frozen layer."""
        self.weight = frozen.weight
        self.register_parameter("bias", frozen.bias)
        device = "cpu" if frozen.weight.is_meta else frozen.weight.device  # the base is yet to come
        zero = torch.zeros(frozen.out_features, dtype=torch.float32, device=device)
        self.adapter_bias = nn.Parameter(zero)
        self.adapter_scale = nn.Parameter(torch.ones_like(zero))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]`` in x's dtype."""
        y = F.linear(x, self.weight, self.bias)
        if not self.active:
            return y
        scale, bias = self.adapter_scale[self.outputs], self.adapter_bias[self.outputs]
        # Written so that autograd keeps the narrow y, not a wide y + b.
        return (y * scale + scale * bias * self.bias_share).to(y.dtype)


class AdaptedNorm(RMSNorm):
    """A root mean square norm with a trained weight beside the frozen one."""

    def __init__(self, frozen: RMSNorm) -> None:
        super().__init__(len(frozen.weight), frozen.eps)
        self.active = True
        """Off, it is the frozen norm."""
        self.weight = frozen.weight
        self.adapter_weight = nn.Parameter(frozen.weight.detach().to(torch.float32, copy=True))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of ``x``."""
        return self.scaled(x, self.adapter_weight if self.active else self.weight)


def adapt_everywhere(model: Llama, *, head: bool) -> None:
    """Replace every norm and linear layer of a frozen model, the output head only if asked to."""
    for parent, name, child in _adaptable(model):
        if isinstance(child, RMSNorm):
            setattr(parent, name, AdaptedNorm(child))
        elif child is not model.lm_head or head:
            setattr(parent, name, AdaptedLinear(child))


def _adaptable(model: Llama) -> list[tuple[nn.Module, str, RMSNorm | nn.Linear]]:
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, RMSNorm | nn.Linear)
    ]


def adapted_modules(model: nn.Module) -> Iterator[AdaptedLinear | AdaptedNorm]:
    """Yield the layers that `adapt_everywhere` put in."""
    for module in model.modules():
        if isinstance(module, AdaptedLinear | AdaptedNorm):
            yield module


def layer_widths(config: LlamaConfig) -> dict[str, int]:
    """Return the output width of every linear layer within a transformer layer, by name."""
    n_query, n_kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    return {
        "self_attn.q_proj": n_query,
        "self_attn.k_proj": n_kv,
        "self_attn.v_proj": n_kv,
        "self_attn.o_proj": config.n_embd,
        "mlp.gate_proj": config.n_hidden,
        "mlp.up_proj": config.n_hidden,
        "mlp.down_proj": config.n_embd,
    }


def expected_widths(config: LlamaConfig, *, head: bool) -> dict[str, int]:
    """Return the name and length of every tensor that `adapt_everywhere` trains."""
    linears = {"lm_head": config.vocab_size} if head else {}
    norms = ["norm"]
    for layer in range(config.n_layer):
        norms += [f"layers.{layer}.{name}" for name in ("input_layernorm", "post_attention_layernorm")]
        linears |= {f"layers.{layer}.{name}": width for name, width in layer_widths(config).items()}
    widths = {f"{norm}.adapter_weight": config.n_embd for norm in norms}
    for name, width in linears.items():
        widths |= {f"{name}.adapter_bias": width, f"{name}.adapter_scale": width}
    return widths
