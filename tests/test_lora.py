"""LoRA: alone and beside prompts, in every executor of a CPU, in files and in PEFT's folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from convert_sources import random_llama as random_source
from convert_sources import write_hf
from finetune_runs import Stopper
from generation_fixtures import save_random_adapter
from paper import paper
from prefix_formula import reference_logits
from random_records import encoded
from safetensors.torch import load_file
from tiny_models import halved, logits, open_adapter, random_ids, random_llama
from torch import Tensor

import lit_adapter
from lit_adapter.config import Config
from lit_adapter.data.packing import Packer, shared_preambles
from lit_adapter.errors import UserError
from lit_adapter.model.adapter import adapter_parameters, adapter_shapes, adapter_state, attach
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.executors import choose
from lit_adapter.model.lora import join_updates, product
from lit_adapter.model.lora_config import LoraConfig
from lit_adapter.model.loss import row_loss
from lit_adapter.training.finetune import finetune
from lit_adapter.weights.adapter_file import read_adapter
from lit_adapter.weights.convert import convert
from lit_adapter.weights.foreign.convert import ConversionOptions, convert_adapter
from lit_adapter.weights.merge import merge

FORMS = {
    "all": AdapterConfig(prompt_length=0, lora=LoraConfig(rank=3)),
    "some": AdapterConfig(prompt_length=0, lora=LoraConfig(rank=2, on=("q_proj", "mlp"))),
    "beside": paper(prompt_length=3, layers=2, lora=LoraConfig(rank=2, on=("k_proj", "v_proj"))),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [{}, {"attention_bias": True, "mlp_bias": True}, {"n_kv_head": 4}], ids=str)
def test_a_trained_one_follows_the_formula_and_an_untrained_one_is_the_base(
    form: str, sizes: dict[str, Any]
) -> None:
    ids = random_ids(13, seed=2)
    with torch.no_grad():
        base = random_llama(6, **sizes).double()
        plain = logits(base, ids[None])
        attach(base, FORMS[form])
        assert torch.equal(logits(base, ids[None]), plain)
        model = open_adapter(random_llama(6, **sizes).double(), FORMS[form], seed=9)
        found = logits(model, ids[None])[0]
        wanted = reference_logits(model.config, model.state_dict(), adapter_state(model), "tanh", ids)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert (found - plain[0]).abs().mean() > 0.05


@pytest.mark.parametrize("form", FORMS)
def test_names_and_shapes_are_those_of_the_module(form: str) -> None:
    model = random_llama(1)
    attach(model, FORMS[form])
    found = {name: tuple(parameter.shape) for name, parameter in adapter_parameters(model)}
    assert found == adapter_shapes(FORMS[form], model.config)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == found.keys()


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (LoraConfig(rank=4), 2.0),
        (LoraConfig(rank=4, alpha=6.0), 1.5),
        (LoraConfig(rank=4, alpha=6.0, rank_stabilised=True), 3.0),
    ],
)
def test_the_scale(config: LoraConfig, scale: float) -> None:
    assert config.scale == scale


@pytest.mark.parametrize("form", FORMS)
def test_packed_rows_give_the_gradients_of_single_records(form: str) -> None:
    model, data = open_adapter(random_llama(5), FORMS[form], seed=1), encoded(4, 9)
    packer = Packer(data, shared_preambles(data), mask_prompt=True, row_tokens=500)
    names, parameters = zip(*adapter_parameters(model), strict=True)
    packed = torch.autograd.grad(row_loss(model, packer.row(list(range(9)))), parameters)
    losses = [row_loss(model, packer.row([index])) for index in range(9)]
    single = torch.autograd.grad(torch.stack(losses).sum(), parameters)
    for name, a, b in zip(names, packed, single, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)
        assert a.abs().sum() > 0, name


@pytest.mark.parametrize("half", [None, 0, 1])
@pytest.mark.parametrize("form", FORMS)
def test_joined_updates_and_their_gradients_are_those_of_the_layers(form: str, half: int | None) -> None:
    """The arithmetic of the CUDA executors, whose own tests need a GPU; also where two share the heads."""
    model = halved(open_adapter(random_llama(5), FORMS[form], seed=1), half)
    for updates in join_updates(model):
        for group, update in updates.items():
            x = torch.randn(7, update.a.shape[1], dtype=torch.float64, requires_grad=True)
            z, y = update.reduce(x), torch.zeros(7, len(update.b), dtype=torch.float64)
            update.add_to(y, z.detach())
            dy = torch.randn_like(y)
            dz = dy @ update.b
            found = update.gradients(dz, product(dy.T, z.detach()), x.detach())
            outputs = [(part.module(x) - block_linear(part.module, x), part.outputs) for part in update.parts]
            total = sum((out * dy[:, place]).sum() for out, place in outputs)
            wanted = torch.autograd.grad(total, [*update.parameters, x])
            for out, place in outputs:
                torch.testing.assert_close(y[:, place], out.detach(), rtol=1e-9, atol=1e-9)
            for a, b in zip(found, wanted[:-1], strict=True):
                torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-6, msg=group)
            torch.testing.assert_close(dz @ update.a, wanted[-1], rtol=1e-9, atol=1e-9)


def block_linear(module: Any, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, module.weight, module.bias)


def saved(base: Path, path: Path, config: AdapterConfig) -> Path:
    """An adapter of a converted base with random tensors."""
    return save_random_adapter(base, path, 5, config, scale=0.2)


@pytest.mark.parametrize("form", FORMS)
def test_cached_decoding_gives_the_tokens_of_the_whole_forward_pass(
    form: str, tiny_base: Path, tmp_path: Path
) -> None:
    path = saved(tiny_base, tmp_path / "a.safetensors", FORMS[form])
    model = lit_adapter.load(adapter=path, base=tiny_base, device="cpu", dtype="float32")
    assert choose(model.model, "decoding").name == "CPU decoding"
    other = saved(tiny_base, tmp_path / "b.safetensors", AdapterConfig(prompt_length=2))
    tasks = [("Say it back.", "red"), ("Repeat the words 3 times in order.", "")]
    together = model.generate_batch(tasks, max_new_tokens=12)
    assert together == [model.generate(*task, max_new_tokens=12) for task in tasks]
    assert together != model.base.generate_batch(tasks, max_new_tokens=12)
    ids = model.template.encode_prompt(model.tokenizer, *tasks[0])
    for _ in range(12):
        chosen = int(model.logits(torch.tensor([ids]))[0, -1].argmax())
        ids.append(chosen)
    text = model.tokenizer.decode(ids[-12:])
    assert together[0] == text[: len(together[0])]
    assert model.with_adapter(other).generate(*tasks[0], max_new_tokens=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], marks=pytest.mark.slow),
        ["--adapter.prompt_length", "0", "--adapter.layers", "null"],
    ],
    ids=["beside prompts", "alone"],
)
def test_a_run_learns_and_resumes_to_the_byte(tiny: Callable[..., Config], options: list[str]) -> None:
    options = [*options, "--adapter.lora.rank", "2", "--adapter.lora.on", "q_proj", "down_proj"]
    options += ["--optim.epochs", "1", "--adapter.lora.dropout", "0.1", "--trainer.samples", "0"]
    whole, run = tiny(*options, out="whole"), tiny(*options)
    lines = Stopper()
    assert finetune(whole, say=lines) == 0
    assert any("LoRA" in line and "on q_proj down_proj" in line for line in lines.lines)
    assert finetune(run, say=Stopper("step 3/")) == 143
    assert finetune(run, resume="last", say=Stopper()) == 0
    files = [Path(config.out) / "adapter.safetensors" for config in (whole, run)]
    assert files[0].read_bytes() == files[1].read_bytes()
    info, state = read_adapter(files[0])
    assert info.adapter.lora == LoraConfig(rank=2, on=("q_proj", "down_proj"), dropout=0.1)
    assert all(bool(tensor.any()) for name, tensor in state.items() if name.endswith("lora_b"))
    with pytest.raises(UserError, match=r"adapter\.lora"):
        finetune(tiny(*options, "--adapter.lora.rank", "3"), resume="last", say=Stopper())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Hugging Face folder with grouped queries, and the same converted."""
    folder = tmp_path_factory.mktemp("lora")
    write_hf(random_source(max_position_embeddings=512), folder / "source")
    return folder / "source", convert(folder / "source", folder / "base")


def theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


IDS = torch.arange(3, 25)[None]


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("on", [("all",), ("q_proj", "v_proj")], ids=str)
def test_peft_reads_ours_and_we_read_peft_with_equal_logits(
    source: tuple[Path, Path], tmp_path: Path, on: tuple[str, ...], stabilised: bool
) -> None:
    base = source[1]
    lora = LoraConfig(rank=3, alpha=5.0, on=on, rank_stabilised=stabilised)
    ours = saved(base, tmp_path / "ours.safetensors", AdapterConfig(prompt_length=0, lora=lora))
    wanted = lit_adapter.load(adapter=ours, base=base, device="cpu", dtype="float32").logits(IDS)
    report = convert_adapter(ours, tmp_path / "peft", ConversionOptions(to="peft-lora", base=base))
    assert any("largest difference 0 " in line for line in report)
    adapted = peft.PeftModel.from_pretrained(theirs(source[0]), tmp_path / "peft").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    adapted.save_pretrained(tmp_path / "again")  # their own files, with every key they write
    convert_adapter(tmp_path / "again", tmp_path / "back.safetensors", ConversionOptions(base=base))
    before, after = (load_file(path) for path in (ours, tmp_path / "back.safetensors"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_adapter(tmp_path / "back.safetensors")[0].adapter.lora.scale == lora.scale


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora is True, which our LoRA does not have"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is"),
        ({"layers_to_transform": [0]}, r"layers_to_transform is \[0\]"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is .'lm_head'.,"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.* does not belong"),
    ],
)
def test_what_ours_cannot_hold_of_peft_is_named(
    source: tuple[Path, Path], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    given = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    adapted = peft.get_peft_model(theirs(source[0]), peft.LoraConfig(**(given | settings)))
    adapted.save_pretrained(tmp_path / "peft")
    with pytest.raises(UserError, match=message):
        convert_adapter(tmp_path / "peft", tmp_path / "ours.safetensors", ConversionOptions(base=source[1]))
    assert not (tmp_path / "ours.safetensors").exists()


@pytest.mark.parametrize("form", ["all", "some"])
def test_it_merges_into_a_plain_llama(source: tuple[Path, Path], tmp_path: Path, form: str) -> None:
    base = source[1]
    adapter = saved(base, tmp_path / "a.safetensors", FORMS[form])
    merge(adapter, tmp_path / "merged", base=base)
    wanted = lit_adapter.load(adapter=adapter, base=base, device="cpu", dtype="float32").logits(IDS)
    with torch.no_grad():
        found = theirs(tmp_path / "merged")(input_ids=IDS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["attention_bias"] is False


@pytest.mark.parametrize(
    ("form", "to", "message"),
    [
        ("beside", "peft", "no LoRA beside its prompts"),
        ("beside", "peft-lora", "has no prompts"),
        ("all", "litgpt", "have no LoRA"),
    ],
)
def test_formats_that_cannot_hold_it_say_so(
    source: tuple[Path, Path], tmp_path: Path, form: str, to: str, message: str
) -> None:
    ours = saved(source[1], tmp_path / "ours.safetensors", FORMS[form])
    with pytest.raises(UserError, match=message):
        convert_adapter(ours, tmp_path / "out", ConversionOptions(to=to, base=source[1]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "adapter.lora.rank is -1; expected 0 to 1024"),
        ({"rank": 2, "alpha": 0.0}, "adapter.lora.alpha is 0.0; expected a number above 0"),
        ({"rank": 2, "on": ("q_prj",)}, "no layer 'q_prj'; did you mean 'q_proj'"),
        ({"rank": 2, "on": ()}, "adapter.lora.on is empty"),
        ({"rank": 2, "dropout": 1.0}, "adapter.lora.dropout is 1.0"),
        ({"on": ("mlp",)}, "adapter.lora.rank is 0; set the rank"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoraConfig(**settings)


def test_v2_and_lora_exclude_each_other() -> None:
    with pytest.raises(UserError, match=r"is given with adapter\.version v2"):
        AdapterConfig(version="v2", lora=LoraConfig(rank=2))


def test_the_published_count() -> None:
    """PEFT's r 8 on q and v of a 7B LLaMA trains 4,194,304 numbers."""
    sizes = LlamaConfig(
        vocab_size=32000, n_layer=32, n_head=32, n_kv_head=32, n_embd=4096, head_dim=128, n_hidden=11008
    )
    config = AdapterConfig(prompt_length=0, lora=LoraConfig(rank=8, on=("q_proj", "v_proj")))
    shapes = adapter_shapes(config, sizes).values()
    assert sum(torch.Size(shape).numel() for shape in shapes) == 4_194_304
