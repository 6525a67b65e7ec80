"""A model of transformers with gated prefix attention (LLaMA-Adapter, arXiv 2303.16199).

`lit-adapter export` puts this file beside the weights, and transformers loads it from there::

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

An adapted layer has a learned prompt ``P [K, C]`` and strengths c. With the layer's own projections,

    y = softmax(q k^T / sqrt(D) + causal) v  +  softmax(q (P Wk)^T / sqrt(D)) (c * (P Wv))

The first term is whatever attention transformers, or the program that calls it, has chosen. The norm of keys
applies to the prompt too, where a family has one; rotary positions and windows do not. The folder holds the
whole model, or names its base (``base_model``), whose weights are then loaded from there.

Letters: B batch, T positions, C width, H query heads, G key/value heads, D head size, K prompt length.
"""

import json
import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.smollm3 import modeling_smollm3
from transformers.utils import cached_file

ADAPTER = "adapter.safetensors"
FINGERPRINT = "fingerprint.json"
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class PrefixSettings:
    """What a configuration has beside its family's."""

    prefix_length: int = 0
    """K."""
    prefix_layers: int = 0
    """The top layers that have a prefix."""
    prefix_per_token: bool = False
    """Whether a head's strengths differ by prompt token."""
    prefix_per_channel: bool = False
    """Whether a head's strengths differ by channel."""
    prefix_unrotated: bool = False
    """Whether queries attend to the prompt as they are before rotary positions."""
    lm_head_bias: bool = False
    """Whether the output layer has a bias."""
    base_model: str | None = None
    """Where the base is: a folder, relative to this one, or a name on the Hub. None: in this folder."""
    base_revision: str | None = None
    """The base's commit on the Hub."""
    base_fingerprint: str | None = None
    """The SHA-256 of the base's weights, compared where the base's folder has one."""


class Prefix(nn.Module):
    """One layer's prompt and strengths."""

    def __init__(self, config: Any, head_dim: int) -> None:
        super().__init__()
        self.axes = (
            config.prefix_length if config.prefix_per_token else 1,
            head_dim if config.prefix_per_channel else 1,
        )
        n_strength = config.num_attention_heads * self.axes[0] * self.axes[1]
        self.prompt = nn.Parameter(torch.zeros(config.prefix_length, config.hidden_size))
        # A linear layer of one input, so that tensor parallelism divides it among processes with the heads.
        self.strength = nn.Linear(1, n_strength, bias=False)

    def strengths(self) -> Tensor:
        """Return c ``[H, K or 1, D or 1]`` of the heads that this process computes."""
        return self.strength(self.prompt.new_ones(1, 1)).view(-1, *self.axes)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend from ``query [B, H, T, D]`` to the prompt's ``key, value [G, K, D]``; ``[B, H, T, D]``."""
        n_group = query.shape[1] // key.shape[0]
        key, value = (rows.repeat_interleave(n_group, dim=0) for rows in (key, value))
        score = (query * query.shape[-1] ** -0.5) @ key.mT
        weight = score.softmax(dim=-1, dtype=torch.float32)
        return (weight @ (value.float() * self.strengths().float())).to(query.dtype)


class PrefixAttention(nn.Module):
    """A family's attention, to which a prefix is added before the output projection."""

    config: Any
    head_dim: int
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    layer_idx: int
    scaling: float
    attention_dropout: float

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # the family's own
        self.unrotated = config.prefix_unrotated
        self.prefix = Prefix(config, self.head_dim)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Map ``[B, T, C]`` to ``[B, T, C]``; the cache has either name, by the version of transformers."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        # The prompt is projected together with the texts: the weights are read once.
        prompt = self.prefix.prompt.to(hidden_states.dtype)
        rows = torch.cat((prompt, hidden_states.flatten(0, -2)))
        query = self.q_proj(hidden_states).view(shape)
        keys, values = (
            layer(rows).view(len(rows), -1, self.head_dim) for layer in (self.k_proj, self.v_proj)
        )
        if hasattr(self, "k_norm"):
            query, keys = self.q_norm(query), self.k_norm(keys)
        query = rotated = query.transpose(1, 2)
        key, value = (own[len(prompt) :].view(shape).transpose(1, 2) for own in (keys, values))
        if getattr(self, "use_rope", True):
            rotated, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
        kwargs |= {"scaling": self.scaling, "sliding_window": window}
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(self, rotated, key, value, attention_mask, dropout=dropout, **kwargs)
        prompt_key, prompt_value = (own[: len(prompt)].transpose(0, 1) for own in (keys, values))
        added = self.prefix(query if self.unrotated else rotated, prompt_key, prompt_value)
        output = output.reshape(*shape[:-2], -1) + added.transpose(1, 2).reshape(*shape[:-2], -1)
        return self.o_proj(output), weights


class _OnBase(PreTrainedModel):
    """Loads the base's weights from where the folder says they are, and then the adapter's."""

    config_class: Any
    # In fp32 whatever the base's precision. Quantisation leaves names with these ends alone: of layers, or
    # with torchao of parameters.
    _keep_in_fp32_modules = [  # noqa: RUF012 (as transformers declares it)
        "prefix",
        "prefix.strength",
        "prefix.strength.weight",
    ]
    _keep_in_fp32_modules_strict = ["prefix"]  # noqa: RUF012
    _keys_to_ignore_on_load_missing = [r"\.prefix\."]  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As every transformers model; ``base_model=`` names another place of the base."""
        hub = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        config = kwargs.pop("config", None)
        if config is None:
            config = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub)
        config.base_model = kwargs.pop("base_model", config.base_model)
        if config.base_model is None:
            return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        adapter: Any = cached_file(pretrained_model_name_or_path, ADAPTER, **hub)
        folder = os.path.join(pretrained_model_name_or_path, hub.get("subfolder", ""))
        base, revision = _base(config, folder), config.base_revision
        for name in ("revision", "subfolder", "_commit_hash"):
            kwargs.pop(name, None)
        config.base_model = config.base_revision = config.base_fingerprint = None  # what is saved is whole
        kwargs |= {} if revision is None else {"revision": revision}
        answer = super().from_pretrained(base, *args, config=config, **kwargs)
        _fill(answer[0] if isinstance(answer, tuple) else answer, load_file(adapter))
        return answer


def _base(config: Any, folder: Any) -> Any:
    """Return the base's folder, or its name on the Hub."""
    place: str = os.path.normpath(os.path.join(folder, str(config.base_model)))
    if not os.path.isdir(place):
        if config.base_revision is None:
            raise OSError(f"{place}: the base of {folder} is not there; give its folder with base_model=...")
        return config.base_model
    fingerprint = os.path.join(place, FINGERPRINT)
    if config.base_fingerprint is not None and os.path.isfile(fingerprint):
        with open(fingerprint, encoding="utf-8") as stream:
            found = json.load(stream)["weights"]
        if found != config.base_fingerprint:
            raise OSError(f"{place}: is another base than the one that {folder} was trained on")
    return place


@torch.no_grad()
def _fill(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy the adapter's tensors into a model with or without an output layer."""
    own = dict(model.named_parameters())
    for name, tensor in state.items():
        parameter = own[name if name in own else name.removeprefix("model.")]
        if ".prefix." in name:  # in fp32; the norms have the base's precision
            parameter.data = parameter.data.float()
        parameter.copy_(tensor)


class _Model(_OnBase):
    """A family's model whose top layers have prefixes."""

    attention: ClassVar[Any]
    layers: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for index in range(config.num_hidden_layers - config.prefix_layers, config.num_hidden_layers):
            self.layers[index].self_attn = self.attention(config, index)
        self.post_init()


class _CausalLM(_OnBase):
    """The same with an output layer."""

    body: ClassVar[Any]

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)  # without the family's own model, which would be as large
        self.model = self.body(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()


def _family(name: str, configuration: Any, code: Any) -> tuple[Any, Any, Any]:
    """Return configuration, model and language model of a family; the names are those of ``config.json``."""

    def made(kind: str, *bases: Any, **values: Any) -> Any:
        return type(f"LitAdapter{name}{kind}", bases, {"__module__": __name__, **values})

    config = made(
        "Config",
        PrefixSettings,
        configuration,
        model_type="lit_adapter",  # of its own, so that no plain model is loaded
        base_model_tp_plan=configuration.base_model_tp_plan
        | {"layers.*.self_attn.prefix.strength": "colwise"},
    )
    attention = made("Attention", PrefixAttention, getattr(code, f"{name}Attention"))
    model = made("Model", _Model, getattr(code, f"{name}Model"), config_class=config, attention=attention)
    theirs = getattr(code, f"{name}ForCausalLM")
    causal = made("ForCausalLM", _CausalLM, theirs, config_class=config, body=model)
    return config, model, causal


LitAdapterLlamaConfig, LitAdapterLlamaModel, LitAdapterLlamaForCausalLM = _family(
    "Llama", LlamaConfig, modeling_llama
)
LitAdapterMistralConfig, LitAdapterMistralModel, LitAdapterMistralForCausalLM = _family(
    "Mistral", MistralConfig, modeling_mistral
)
LitAdapterQwen2Config, LitAdapterQwen2Model, LitAdapterQwen2ForCausalLM = _family(
    "Qwen2", Qwen2Config, modeling_qwen2
)
LitAdapterQwen3Config, LitAdapterQwen3Model, LitAdapterQwen3ForCausalLM = _family(
    "Qwen3", Qwen3Config, modeling_qwen3
)
LitAdapterSmolLM3Config, LitAdapterSmolLM3Model, LitAdapterSmolLM3ForCausalLM = _family(
    "SmolLM3", SmolLM3Config, modeling_smollm3
)
