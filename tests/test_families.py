"""Every family against transformers: random models, each option on and off, beyond the window's length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from convert_sources import write_gguf
from prefix_formula import reference_logits
from random_records import encoded
from tiny_models import from_transformers, logits, open_adapter, random_ids, random_llama, randomise

from lit_adapter.data.packing import Packer, shared_preambles
from lit_adapter.errors import UserError
from lit_adapter.model.adapter import adapter_state
from lit_adapter.model.attention import SegmentView
from lit_adapter.model.cache import ModuleDecode
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.cpu_decode import CpuDecode
from lit_adapter.model.pieces import Piece
from lit_adapter.model.slot_prefixes import Prefixes
from lit_adapter.text.load import load_tokenizer
from lit_adapter.weights.base_folder import read_config
from lit_adapter.weights.convert import convert
from lit_adapter.weights.gguf_config import GGUFKeys, config_of
from lit_adapter.weights.load import load_base

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
THETA = {"rope_type": "default", "rope_theta": 500.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 6}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 8.0,
}
GGUF_SIZES: dict[str, Any] = {
    "embedding_length": 32,
    "block_count": 4,
    "attention.head_count": 4,
    "feed_forward_length": 40,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "context_length": 64,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2-tied-mha": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen2-theta": ("qwen2", {"rope_parameters": THETA}),
    "qwen2-upper-windows": ("qwen2", {**WINDOW, "max_window_layers": 2}),
    "qwen2-windows": ("qwen2", {**WINDOW, "max_window_layers": 0}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "qwen3-biases-tied": ("qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-windows": ("qwen3", {"head_dim": 8, **WINDOW, "max_window_layers": 1}),
    "qwen3-yarn": ("qwen3", {"head_dim": 16, "rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-windows": ("mistral", {"sliding_window": 6}),
    "mistral-one-key": ("mistral", {"sliding_window": 1}),
    "mistral-wide-heads": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral-yarn": ("mistral", {"sliding_window": 6, "rope_parameters": {**YARN, "truncate": False}}),
    "smollm3": ("smollm3", {"tie_word_embeddings": True}),
    "smollm3-all-rotated": ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}),
    "smollm3-second": ("smollm3", {"no_rope_layer_interval": 2, "attention_bias": True, "mlp_bias": True}),
    "smollm3-windows": ("smollm3", {**WINDOW, "no_rope_layers": [0, 1, 1, 0]}),
    "smollm3-yarn": ("smollm3", {"rope_parameters": {**YARN, "mscale": 0.8, "mscale_all_dim": 1.0}}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
}


def theirs(name: str, seed: int = 3) -> Any:
    """A random model of transformers, in fp32."""
    kind, options = CASES[name]
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **options}, attn_implementation="sdpa")
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    randomise(model, seed)
    return model.requires_grad_(False)


def assert_near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Relative to the largest logit, which is about 5."""
    assert wanted.std() > 0.3  # the comparison sees something
    assert float((found - wanted).abs().max() / wanted.abs().max()) < tolerance


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name: str) -> None:
    model, ids = theirs(name), random_ids(2, 90)
    assert_near(logits(from_transformers(model, torch.float32), ids), model(ids).logits)


@pytest.mark.parametrize("name", CASES)
def test_cached_steps_equal_transformers(name: str) -> None:
    """Prompts of unequal length read together, then steps, beyond the window; and one text alone."""
    model = theirs(name)
    ours = from_transformers(model, torch.float32)
    texts = [random_ids(length, seed=length) for length in (14, 23, 18)]
    n_read = (3, 12, 7)
    for kind in (ModuleDecode, CpuDecode):
        for n in (1, 3):
            with torch.inference_mode():
                wanted = [model(text[None]).logits[0] for text in texts[:n]]
                decode = kind(ours, n, 40)
                none = Prefixes()
                prompts = [text[:start].tolist() for text, start in zip(texts, n_read, strict=True)][:n]
                pieces = [Piece(prompt, slot, none) for slot, prompt in enumerate(prompts)]
                found = [ours.logits(decode.read(pieces))]
                for step in range(11):
                    places = [start + step for start in n_read[:n]]
                    tokens = [int(text[place]) for text, place in zip(texts, places, strict=False)]
                    found.append(decode.step(tokens, places))
            for step, rows in enumerate(found):
                for row, exact, start in zip(rows, wanted, n_read, strict=False):
                    assert_near(row, exact[start - 1 + step])


@pytest.mark.parametrize("name", ["qwen2-windows", "qwen3", "mistral-windows", "smollm3", "llama-yarn"])
def test_bf16_gives_nearly_the_same_loss(name: str) -> None:
    """As transformers in fp32, but for what bf16 rounds: less than a percent."""
    model, ids = theirs(name), random_ids(2, 90)
    ours = from_transformers(model, torch.float32)
    frequency = ours.inverse_frequency
    narrow = ours.bfloat16()
    narrow.inverse_frequency = frequency
    wanted, found = (
        torch.nn.functional.cross_entropy(x[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        for x in (model(ids).logits, logits(narrow, ids))
    )
    assert float(found) == pytest.approx(float(wanted), rel=5e-3)


@pytest.mark.parametrize("name", CASES)
def test_packed_records_equal_transformers(name: str) -> None:
    """Records of one row, behind a preamble that they share, each as if it were alone."""
    model = theirs(name)
    ours = from_transformers(model, torch.float32)
    data = encoded(1, 6, longest=40)
    row = Packer(data, shared_preambles(data), mask_prompt=True, row_tokens=10_000).row(list(range(6)))
    view = SegmentView(row, ours.rotation(row.position[None]))
    assert len(row.segment.unique()) > 6  # there is a shared preamble
    found = ours.logits(ours(row.ids[None], view))[0]
    for number in row.segment.unique().tolist():
        own = row.segment == number
        before = row.segment == int(row.preamble[own][0])
        text = row.ids[own | before][None]
        assert_near(found[own], model(text).logits[0, -int(own.sum()) :])


@pytest.mark.parametrize("name", CASES)
def test_a_configuration_survives_both_round_trips(name: str) -> None:
    kind, options = CASES[name]
    raw = transformers.AutoConfig.for_model(kind, **{**SIZES, **options}).to_dict()
    config = LlamaConfig.from_hf(raw)
    assert config.family == kind
    assert LlamaConfig.from_hf(config.to_hf()) == config
    through = transformers.AutoConfig.for_model(**config.to_hf())
    assert LlamaConfig.from_hf(through.to_dict()) == config
    assert config.to_hf()["architectures"] == [type(theirs(name)).__name__]


@pytest.mark.parametrize(
    ("kind", "architecture", "pre", "options"),
    [
        ("qwen2", "qwen2", "qwen2", {"tie_word_embeddings": True}),
        ("qwen2", "qwen2", "deepseek-r1-qwen", {"rope_parameters": {**YARN, "beta_fast": 32.0}}),
        ("qwen3", "qwen3", "qwen2", {"head_dim": 24}),
        ("smollm3", "smollm3", "smaug-bpe", {"tie_word_embeddings": True}),
        ("mistral", "llama", "tekken", {"head_dim": 24, "sliding_window": None}),
    ],
)
def test_gguf_files_give_the_model_they_were_made_of(
    tmp_path: Path, kind: str, architecture: str, pre: str, options: dict[str, Any]
) -> None:
    """Quantised to Q8_0, which needs rows of 32; converted, and read again by transformers."""
    sizes = {**SIZES, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, **options}
    config = transformers.AutoConfig.for_model(kind, **{"head_dim": 16, **sizes})
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    randomise(model, 5)
    control = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
    q8 = gguf.GGMLQuantizationType.Q8_0
    held = write_gguf(model, tmp_path / "model.gguf", q8, architecture=architecture, pre=pre, control=control)
    model.load_state_dict(held, strict=False)
    out = convert(tmp_path / "model.gguf", tmp_path / "base")
    ids = random_ids(1, 60)
    ours = load_base(out, device="cpu", dtype=torch.float32)
    again = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        assert_near(logits(ours, ids), model(ids).logits)
        assert_near(again(ids).logits, model(ids).logits)
    assert read_config(out).family == architecture
    tokenizer = load_tokenizer(out)
    assert tokenizer.stop_ids == ({257} if architecture == "llama" else {256, 257})


def test_a_gguf_window_without_its_layers_is_refused() -> None:
    for architecture, window in (("qwen2", 8), ("smollm3", 8), ("llama", 8), ("qwen2", 64)):
        fields = {
            "general.architecture": architecture,
            f"{architecture}.attention.sliding_window": window,
            **{f"{architecture}.{key}": value for key, value in GGUF_SIZES.items()},
        }
        keys, shapes = GGUFKeys(Path("model.gguf"), fields), {"token_embd.weight": (61, 32)}
        if architecture == "llama":
            assert config_of(keys, shapes, None).window_of(3) == 8
        elif window < 64:
            with pytest.raises(UserError, match="does not say which layers have the window"):
                config_of(keys, shapes, None)
        else:
            assert config_of(keys, shapes, None).window is None


FORMS: list[dict[str, Any]] = [
    {"prompt_length": 3},
    {"prompt_length": 4, "layers": 2, "gate": "token", "prefix_query": "unrotated", "norms": True},
    {"prompt_length": 2, "version": "v2", "gate": "channel"},
]
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen2": {"qkv_bias": True, "window": 5, "windowed_layers": (1, 2)},
    "qwen3": {"head_norms": True, "window": 5, "windowed_layers": (0,)},
    "smollm3": {"unrotated_layers": (1,), "attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("form", FORMS, ids=["v1", "formed", "v2"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_an_adapter_follows_the_formula(settings: dict[str, Any], form: dict[str, Any]) -> None:
    """In fp64, head by head; the prefix is seen beyond the window, and its keys pass the norm of keys."""
    config = AdapterConfig(**form)
    model = open_adapter(random_llama(4, **settings).double(), config, seed=2)
    ids = random_ids(20, seed=3)
    with torch.no_grad():
        found = logits(model, ids[None])[0]
        state, trained = model.state_dict(), adapter_state(model)
        wanted = reference_logits(model.config, state, trained, config.gate, ids, config.prefix_query)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
