"""Sizes of a LLaMA, read from ``config.json`` (Hugging Face) or ``params.json`` (Meta). No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from lit_adapter.errors import UserError, counted
from lit_adapter.model import families
from lit_adapter.model.config_keys import divided_head_dim, given, reading_sizes, required
from lit_adapter.model.families import FamilyName
from lit_adapter.model.gates import GateName
from lit_adapter.model.lora_config import LoraConfig
from lit_adapter.model.rope_config import RopeConfig

MOST = {"n_layer": 2**12, "n_head": 2**14, "n_kv_head": 2**14, "head_dim": 2**14}
MOST_WIDE = 2**24
"""Bounds far above any LLaMA. A file with larger sizes is damaged; nothing is allocated for it."""
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
class LlamaConfig:
    """Everything that shapes a model: a LLaMA, or one of the families that differ from it by a setting here.

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
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_embeddings: bool = False
    attention_bias: bool = False
    """Biases on all four layers of attention."""
    qkv_bias: bool = False
    """Biases on queries, keys and values alone."""
    mlp_bias: bool = False
    head_norms: bool = False
    """A norm of each head's queries and one of its keys, before they are rotated."""
    window: int | None = None
    """The last positions that a query sees in `windowed_layers`, its own among them."""
    windowed_layers: tuple[int, ...] = ()
    unrotated_layers: tuple[int, ...] = ()
    """Layers without rotary positions."""
    family: FamilyName = "llama"
    """The family whose name the configuration is written under; nothing is computed from it."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_hidden")
        for name in (*sizes, "context_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"model config: {name} is {value!r}; expected a whole number above 0")
            most = MOST.get(name, MOST_WIDE)
            if value > most:
                raise UserError(f"model config: {name} is {value}; expected {most} or less")
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
        self._check_layers()

    def _check_layers(self) -> None:
        """Refuse a window that hides everything or nothing, and settings of layers that are not there."""
        window = self.window
        if window is not None and not (isinstance(window, int) and 1 <= window <= self.context_length):
            raise UserError(
                f"model config: the window is {window!r}; "
                f"expected a whole number from 1 to the context length {self.context_length}"
            )
        if self.windowed_layers and window is None:
            raise UserError("model config: layers have a window, but its size is missing")
        beyond = [layer for layer in (*self.windowed_layers, *self.unrotated_layers) if layer >= self.n_layer]
        if beyond:
            raise UserError(
                f"model config: there is a setting for layer {beyond[0]}, but there are {self.n_layer} layers"
            )

    def shard(self, n_shards: int) -> LlamaConfig:
        """Return the sizes of one shard where ``n_shards`` processes share the heads and the MLP's width."""
        shared = {name: getattr(self, name) // n_shards for name in ("n_head", "n_kv_head", "n_hidden")}
        return replace(self, **shared)

    def window_of(self, layer: int) -> int | None:
        """Return the window of a layer; None where a query sees all positions before it."""
        return self.window if layer in self.windowed_layers else None

    def kind_of(self, layer: int) -> tuple[bool, bool]:
        """Return whether a layer has a window, and rotary positions; layers of one kind are alike."""
        return layer in self.windowed_layers, layer not in self.unrotated_layers

    def of_layers(self, layers: Sequence[int]) -> LlamaConfig:
        """Return the configuration of a model that has some of this one's layers, in the order given."""
        windowed, unrotated = (
            tuple(new for new, layer in enumerate(layers) if layer in found)
            for found in (self.windowed_layers, self.unrotated_layers)
        )
        return replace(self, n_layer=len(layers), windowed_layers=windowed, unrotated_layers=unrotated)

    def computed(self) -> dict[str, Any]:
        """Return everything besides the weights that a model's output depends on, by name."""
        values = asdict(self)
        del values["family"]
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
            return cls(**families.read(raw, source))

    @classmethod
    def from_meta(
        cls, params: dict[str, Any], *, vocab_size: int, n_hidden: int, source: str = "params.json"
    ) -> LlamaConfig:
        """Read Meta's ``params.json``; the two sizes that it omits come from the tensors.

        Raises:
            UserError: a missing key, or an impossible value.
        """
        with reading_sizes(source):
            n_embd, n_head = required(params, "dim", source), required(params, "n_heads", source)
            rope = RopeConfig(theta=float(given(params, "rope_theta", 10_000.0)))
            if params.get("use_scaled_rope"):
                # Meta ships the flag alone; 3.1 scales by 8, 3.2 says 32 in `rope_scaling_factor`.
                rope = RopeConfig(rope.theta, "llama3", float(given(params, "rope_scaling_factor", 8.0)))
            early = 4096 if "n_kv_heads" in params else 2048
            context = 131_072 if rope.kind == "llama3" else 8192 if vocab_size > 100_000 else early
            return cls(
                vocab_size=vocab_size,
                n_layer=required(params, "n_layers", source),
                n_head=n_head,
                n_kv_head=given(params, "n_kv_heads", n_head),
                n_embd=n_embd,
                head_dim=divided_head_dim(n_embd, n_head, "dim"),
                n_hidden=n_hidden,
                norm_eps=float(given(params, "norm_eps", 1e-5)),
                context_length=int(given(params, "max_seq_len", context)),
                rope=rope,
            )

    def to_hf(self) -> dict[str, Any]:
        """Return the ``config.json`` that transformers and `from_hf` read."""
        return families.write(self)


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

    prompt_length: int = 8
    """Learned prompt tokens per adapted layer (K). 0 (only with v2, norms or lora): no prompts, so that
    scripts/merge.py can merge base and adapter into a plain LLaMA."""
    layers: int | None = None
    """How many of the top layers carry a prefix (L); null means all. Without v2 and LoRA, only the norms of
    these layers and the last one are trained."""
    gate: GateName = "token"
    """What scales the prefix: one gate per head and prompt token (token), per head (identity), per layer
    (layer), or per head and channel (channel); or, as in the paper, one per head, squashed into -1 to 1 by
    tanh (tanh)."""
    prefix_query: Literal["rotated", "unrotated"] = "rotated"
    """Which queries attend to the prompts: with rotary positions (rotated, the paper's), or before these are
    applied (unrotated)."""
    prompt_init_std: float = 0.1
    """Standard deviation of the initial prompts; the paper's is 1."""
    dropout: float = 0.0
    """Dropout on the prefix attention weights while training."""
    version: Literal["v1", "v2"] = "v1"
    """v1: prompts and gates, and norms as adapter.norms says. v2: also every norm, and a bias and a scale on
    every linear layer."""
    norms: bool | None = None
    """Train the weights of the norms too, without v2's biases and scales. null: true with prompts, but false
    with LoRA. v2 always trains them."""
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
        v2, norms = self.version == "v2", self.norms
        if norms is None:
            norms = self.prompt_length > 0 and not self.lora.rank
        trained = {"prefix": True, "norms": v2 or norms, "linears": v2, "lora": self.lora.rank > 0}
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

    def learning_layers(self, n_layer: int) -> range:
        """Return the indices of the layers in which something is trained: those with a prefix, or all.

        The layers below them need no backward pass, so prompts with norms alone train no norm there.
        """
        alone = self.prompt_length > 0 and {*self.parts} <= {"prefix", "norms"}
        return self.adapted_layers(n_layer) if alone else range(n_layer)
