"""Sizes of a LLaMA, read from ``config.json`` (Hugging Face) or ``params.json`` (Meta). No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from lit_adapter.errors import UserError, counted
from lit_adapter.model.gates import GateName
from lit_adapter.model.lora_config import LoraConfig

MOST = {"n_layer": 2**12, "n_head": 2**14, "n_kv_head": 2**14, "head_dim": 2**14}
MOST_WIDE = 2**24
"""Bounds far above any LLaMA. A file with larger sizes is damaged; nothing is allocated for it."""
RopeKind = Literal["default", "linear", "llama3"]
MOST_PROMPTS = 65536
"""Prompt tokens per layer. A larger number is a typing error whose allocation would fail."""

FP32 = (1.2e-38, 3.4e38)
"""The range of normal fp32 numbers: smaller ones lose precision or become 0, larger ones become infinite."""


def check_fp32(name: str, value: float, *, zero: bool = False) -> None:
    """Refuse a setting that is negative, or 0 or infinite in fp32; ``zero`` allows 0 itself.

    Raises:
        UserError: names the setting and its range.
    """
    if FP32[0] <= value <= FP32[1] or (zero and value == 0):
        return
    if 0 < value < float("inf"):
        raise UserError(
            f"{name} is {value:g}; expected a number from {FP32[0]:g} to {FP32[1]:g}, the range of fp32"
        )
    raise UserError(f"{name} is {value}; expected a finite number{', 0 or more' if zero else ' above 0'}")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: the base frequency, and how it is scaled for long contexts.

    ``linear`` divides every frequency by ``factor``; ``llama3`` (Llama 3.1) divides the low ones, keeps the
    high ones and blends between them.
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192

    def __post_init__(self) -> None:
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "original_context_length"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UserError(f"model config: rope {name} is {value}; expected a number above 0")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise UserError(
                f"model config: rope low_freq_factor is {self.low_freq_factor}; "
                f"expected less than high_freq_factor {self.high_freq_factor}"
            )


@dataclass(frozen=True)
class LlamaConfig:
    """Everything that shapes a LLaMA.

    Raises:
        UserError: sizes that cannot go together, each named with its value.
    """

    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    head_dim: int
    n_hidden: int
    """Width of the MLP (`intermediate_size`)."""
    norm_eps: float = 1e-5
    context_length: int = 2048
    rope: RopeConfig = RopeConfig()
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_hidden")
        for name in (*sizes, "context_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"model config: {name} is {value!r}; expected a whole number above 0")
            if value > MOST.get(name, MOST_WIDE):
                raise UserError(
                    f"model config: {name} is {value}; expected {MOST.get(name, MOST_WIDE)} or less"
                )
        if self.n_head % self.n_kv_head:
            raise UserError(
                f"model config: {self.n_head} query heads cannot share {self.n_kv_head} key/value heads; "
                "the first must be a multiple of the second"
            )
        if self.head_dim % 2:
            raise UserError(
                f"model config: head_dim is {self.head_dim}; rotary positions need an even number"
            )
        if not 0 < self.norm_eps < 1:
            raise UserError(f"model config: norm_eps is {self.norm_eps}; expected a number between 0 and 1")

    def shard(self, n_shards: int) -> LlamaConfig:
        """Return the sizes of one shard where ``n_shards`` processes share the heads and the MLP's width."""
        shared = {name: getattr(self, name) // n_shards for name in ("n_head", "n_kv_head", "n_hidden")}
        return replace(self, **shared)

    def computed(self) -> dict[str, Any]:
        """Return everything besides the weights that a model's output depends on, by name."""
        values = asdict(self)
        rope = {f"rope.{name}": value for name, value in values.pop("rope").items()}
        return {name: value for name, value in values.items() if name != "context_length"} | rope

    @classmethod
    def from_hf(cls, raw: dict[str, Any], source: str = "config.json") -> LlamaConfig:
        """Read a Hugging Face ``config.json``, in the spelling of transformers 4 or 5.

        Args:
            raw: the parsed file.
            source: its name, for messages.

        Raises:
            UserError: another architecture, a missing key, an unknown kind of RoPE, or an impossible value.
        """
        with reading_sizes(source):
            return cls._from_hf(raw, source)

    @classmethod
    def _from_hf(cls, raw: dict[str, Any], source: str) -> LlamaConfig:
        _refuse_other_architectures(raw, source)
        n_embd = _required(raw, "hidden_size", source)
        n_head = _required(raw, "num_attention_heads", source)
        head_dim = raw.get("head_dim")
        return cls(
            vocab_size=_required(raw, "vocab_size", source),
            n_layer=_required(raw, "num_hidden_layers", source),
            n_head=n_head,
            n_kv_head=_given(raw, "num_key_value_heads", n_head),
            n_embd=n_embd,
            head_dim=_head_dim(n_embd, n_head, "hidden_size") if head_dim is None else head_dim,
            n_hidden=_required(raw, "intermediate_size", source),
            norm_eps=float(_given(raw, "rms_norm_eps", 1e-6)),
            context_length=int(_given(raw, "max_position_embeddings", 2048)),
            rope=_rope_from_hf(raw, source),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
        )

    @classmethod
    def from_meta(
        cls, params: dict[str, Any], *, vocab_size: int, n_hidden: int, source: str = "params.json"
    ) -> LlamaConfig:
        """Read Meta's ``params.json``; the two sizes that it omits come from the tensors.

        Raises:
            UserError: a missing key, or an impossible value.
        """
        with reading_sizes(source):
            return cls._from_meta(params, vocab_size, n_hidden, source)

    @classmethod
    def _from_meta(cls, params: dict[str, Any], vocab_size: int, n_hidden: int, source: str) -> LlamaConfig:
        n_embd, n_head = _required(params, "dim", source), _required(params, "n_heads", source)
        rope = RopeConfig(theta=float(_given(params, "rope_theta", 10_000.0)))
        if params.get("use_scaled_rope"):
            # Meta ships the flag alone; 3.1 scales by 8, 3.2 says 32 in `rope_scaling_factor`.
            rope = RopeConfig(rope.theta, "llama3", float(_given(params, "rope_scaling_factor", 8.0)))
        llama3 = vocab_size > 100_000
        context = (
            131_072 if rope.kind == "llama3" else 8192 if llama3 else 4096 if "n_kv_heads" in params else 2048
        )
        return cls(
            vocab_size=vocab_size,
            n_layer=_required(params, "n_layers", source),
            n_head=n_head,
            n_kv_head=_given(params, "n_kv_heads", n_head),
            n_embd=n_embd,
            head_dim=_head_dim(n_embd, n_head, "dim"),
            n_hidden=n_hidden,
            norm_eps=float(_given(params, "norm_eps", 1e-5)),
            context_length=int(_given(params, "max_seq_len", context)),
            rope=rope,
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the ``config.json`` that transformers and `from_hf` read."""
        rope: dict[str, Any] = {"rope_type": self.rope.kind, "rope_theta": self.rope.theta}
        if self.rope.kind != "default":
            rope["factor"] = self.rope.factor
        if self.rope.kind == "llama3":
            rope["low_freq_factor"] = self.rope.low_freq_factor
            rope["high_freq_factor"] = self.rope.high_freq_factor
            rope["original_max_position_embeddings"] = self.rope.original_context_length
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "num_hidden_layers": self.n_layer,
            "num_attention_heads": self.n_head,
            "num_key_value_heads": self.n_kv_head,
            "hidden_size": self.n_embd,
            "head_dim": self.head_dim,
            "intermediate_size": self.n_hidden,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "max_position_embeddings": self.context_length,
            "rope_parameters": rope,
            "tie_word_embeddings": self.tie_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
        }


@contextmanager
def reading_sizes(source: str) -> Iterator[None]:
    """Name the file in errors about the sizes that are read inside the block.

    Raises:
        UserError: a value of a wrong type, or one that no LLaMA has.
    """
    try:
        yield
    except UserError as error:
        raise (error if source in str(error) else UserError(f"{source}: {error}")) from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{source}: a value has the wrong type ({error})") from None


def _head_dim(n_embd: int, n_head: int, key: str) -> int:
    """Return the size of a head, where ``n_head`` heads divide a width; ``key`` names it in messages."""
    if n_head < 1:
        raise UserError(f"there are {n_head} attention heads; expected 1 or more")
    if n_embd % n_head:
        raise UserError(
            f"{key} {n_embd} is not a multiple of the {n_head} attention heads, "
            "and the file does not give head_dim"
        )
    return n_embd // n_head


def _required(raw: dict[str, Any], key: str, source: str) -> Any:
    if raw.get(key) is None:
        raise UserError(f"{source}: key '{key}' is missing")
    return raw[key]


def _given(raw: dict[str, Any], key: str, default: Any) -> Any:
    """Return a value, or the default where the key is absent or null."""
    return default if raw.get(key) is None else raw[key]


def _refuse_other_architectures(raw: dict[str, Any], source: str) -> None:
    kind = raw.get("model_type")
    if kind != "llama":
        raise UserError(f"{source}: model_type is {kind!r}; only 'llama' models can be adapted")
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(f"{source}: hidden_act is {activation!r}; a LLaMA uses 'silu'")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise UserError(f"{source}: the weights are quantised ({method}); convert the original checkpoint")


def _rope_from_hf(raw: dict[str, Any], source: str) -> RopeConfig:
    """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    rope = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"{source}: rope type {kind!r} is not known; expected default, linear or llama3")
    theta = _given(rope, "rope_theta", _given(raw, "rope_theta", 10_000.0))
    if kind == "default":
        return RopeConfig(float(theta))
    factor = float(_required(rope, "factor", f"{source}: rope"))
    if kind == "linear":
        return RopeConfig(float(theta), "linear", factor)
    return RopeConfig(
        theta=float(theta),
        kind="llama3",
        factor=factor,
        low_freq_factor=float(_required(rope, "low_freq_factor", f"{source}: rope")),
        high_freq_factor=float(_required(rope, "high_freq_factor", f"{source}: rope")),
        original_context_length=int(_required(rope, "original_max_position_embeddings", f"{source}: rope")),
    )


def differences(a: LlamaConfig, b: LlamaConfig) -> list[str]:
    """Name the settings in which two configurations differ, with both values."""
    others = b.computed()
    return [
        f"{name} {value} and {others[name]}" for name, value in a.computed().items() if value != others[name]
    ]


VERSIONS = ("v1", "v2")
"""Short names for sets of trained parts; see `AdapterConfig.parts`."""


@dataclass(frozen=True)
class AdapterConfig:
    """Sizes and form of the adapter: gated prefix attention (arXiv 2303.16199), and V2 (arXiv 2304.15010).

    Raises:
        UserError: a value out of its range.
    """

    prompt_length: int = 10
    """Learned prompt tokens per adapted layer (K). 0, with v2, norms or lora only: no prompts, so that
    scripts/merge.py can merge base and adapter into a plain LLaMA."""
    layers: int | None = None
    """How many of the top layers carry a prefix (L); null means all of them."""
    gate: GateName = "tanh"
    """What scales the prefix. tanh, the paper's: one gate per attention head, squashed into -1 to 1 by tanh.
    Not squashed: one per attention head (identity), per layer (layer), per head and channel (channel), or per
    head and prompt token (token)."""
    prefix_query: Literal["rotated", "unrotated"] = "rotated"
    """Which queries attend to the prompts: with their positions (rotated, the paper's), or as they are before
    rotary positions (unrotated)."""
    prompt_init_std: float = 0.1
    """Standard deviation of the initial prompts; the paper's is 1."""
    dropout: float = 0.0
    """Dropout on the prefix attention weights while training."""
    version: Literal["v1", "v2"] = "v1"
    """v1: prompts and gates. v2: also every norm, and a bias and a scale on every linear layer."""
    norms: bool = False
    """Train the weight of every norm too, without v2's biases and scales. v2 always trains them."""
    head: bool = False
    """v2: a bias and a scale on the output layer (lm_head) too."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank updates of the linear layers, beside the prompts or, with prompt_length 0, alone."""

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            raise UserError(f"adapter.version is {self.version!r}; expected {' or '.join(VERSIONS)}")
        if self.prompt_length < 0 or (self.prompt_length == 0 and self.parts == ("prefix",)):
            hint = " (0 is for adapter.version v2, norms or lora)" if self.prompt_length == 0 else ""
            raise UserError(f"adapter.prompt_length is {self.prompt_length}; expected 1 or more{hint}")
        if self.prompt_length == 0 and self.layers is not None:
            raise UserError(
                f"adapter.layers is {self.layers}, but with adapter.prompt_length 0 no layer has prompts; "
                "leave one of them out"
            )
        if self.lora.rank and "linears" in self.parts:
            raise UserError("adapter.lora.rank is given with adapter.version v2; choose one of them")
        if self.head and "linears" not in self.parts:
            raise UserError("adapter.head is true; it needs adapter.version v2")
        if self.prompt_length > MOST_PROMPTS:
            raise UserError(f"adapter.prompt_length is {self.prompt_length}; expected {MOST_PROMPTS} or less")
        if self.layers is not None and self.layers < 1:
            raise UserError(f"adapter.layers is {self.layers}; expected 1 or more, or null for all layers")
        check_fp32("adapter.prompt_init_std", self.prompt_init_std)
        if not 0 <= self.dropout < 1:
            raise UserError(f"adapter.dropout is {self.dropout}; expected 0 or more and below 1")

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the trained parts."""
        v2 = self.version == "v2"
        trained = {"prefix": True, "norms": v2 or self.norms, "linears": v2, "lora": self.lora.rank > 0}
        return tuple(name for name, is_trained in trained.items() if is_trained)

    def without_dropout(self) -> AdapterConfig:
        """Return the same form for use after training."""
        return replace(self, dropout=0.0, lora=replace(self.lora, dropout=0.0))

    def adapted_layers(self, n_layer: int) -> range:
        """Return the indices of the layers of a model of ``n_layer`` layers that carry a prefix.

        Raises:
            UserError: more layers asked for than the model has.
        """
        count = n_layer if self.layers is None else self.layers
        if self.prompt_length == 0:
            count = 0
        if count > n_layer:
            raise UserError(f"adapter.layers is {count}; the base has {counted(n_layer, 'layer')}")
        return range(n_layer - count, n_layer)
