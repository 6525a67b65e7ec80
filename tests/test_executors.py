"""Every executor steps aside for what it does not know, and says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from paper import paper
from random_records import encoded
from tiny_models import open_adapter, random_ids, random_llama
from torch import nn

from lit_adapter.data.packing import Packer, shared_preambles
from lit_adapter.generation.adapter import Adapter
from lit_adapter.generation.engine import Engine
from lit_adapter.generation.request import Request
from lit_adapter.generation.settings import Sampling
from lit_adapter.model.attention import CausalView
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.executors import Setting, choose
from lit_adapter.model.llama import Llama, RMSNorm
from lit_adapter.model.loss import row_loss
from lit_adapter.model.prefix import GatedPrefix
from lit_adapter.model.survey import FROZEN, obstacle

PLACES: dict[str, Callable[[Llama], nn.Module]] = {
    "attention": lambda model: model.layers[1].self_attn,
    "MLP": lambda model: model.layers[1].mlp,
    "block": lambda model: model.layers[1],
    "model": lambda model: model,
    "linear layer": lambda model: model.layers[1].self_attn.q_proj,
}


def add_child(module: nn.Module) -> None:
    module.add_module("post_norm", RMSNorm(8, 1e-5))


def add_parameter(module: nn.Module) -> None:
    module.register_parameter("sink", nn.Parameter(torch.ones(4), requires_grad=False))


def add_buffer(module: nn.Module) -> None:
    module.register_buffer("cap", torch.ones(1))


def add_hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: 2 * output)


def replace_forward(module: Any) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


UNKNOWN = [add_child, add_parameter, add_buffer, add_hook, replace_forward]
WITH_PREFIX = FROZEN | {GatedPrefix}


def adapted(dtype: torch.dtype = torch.float32) -> Llama:
    return open_adapter(random_llama(0, dtype, head_dim=16), paper(layers=2, prompt_length=3)).eval()


@pytest.mark.parametrize("unknown", UNKNOWN, ids=lambda add: add.__name__)
@pytest.mark.parametrize("place", PLACES)
def test_a_survey_finds_what_is_not_declared(place: str, unknown: Callable[[nn.Module], None]) -> None:
    model = adapted()
    assert obstacle(model, WITH_PREFIX) is None
    unknown(PLACES[place](model))
    assert obstacle(model, WITH_PREFIX) is not None


@pytest.mark.parametrize(
    "config",
    [paper(), paper(version="v2", head=True), paper(version="v2", prompt_length=0)],
)
def test_an_executor_that_knows_no_trained_part_names_the_first(config: AdapterConfig) -> None:
    model = open_adapter(random_llama(1), config)
    assert obstacle(random_llama(1)) is None
    why = obstacle(model)
    assert why is not None
    assert any(kind in why for kind in ("GatedPrefix", "AdaptedNorm", "AdaptedLinear"))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_every_base_of_the_declaration_is_known(bias: bool, tie: bool) -> None:
    model = random_llama(2, attention_bias=bias, mlp_bias=bias, tie_embeddings=tie)
    assert obstacle(model) is None


@pytest.mark.parametrize("unknown", UNKNOWN, ids=lambda add: add.__name__)
@pytest.mark.parametrize("place", PLACES)
def test_decoding_on_a_cpu_leaves_an_unknown_model_to_its_modules(
    place: str, unknown: Callable[[nn.Module], None]
) -> None:
    """With their logits: a lane whose executor did not step aside would answer as if nothing were added."""
    model = adapted().requires_grad_(False)
    assert choose(model, "decoding").name == "CPU decoding"
    unknown(PLACES[place](model))
    executor = choose(model, "decoding")
    assert executor.name == "modules"
    assert executor.why_not_fast
    with torch.inference_mode():
        request = Request(random_ids(6).tolist(), Sampling(max_new_tokens=4), Adapter.of(model))
        engine = Engine()
        tokens = [token for _, token in engine.run([request]) if token is not None]
        text = list(request.prompt)
        for token in tokens:
            view = CausalView(model.rotation(torch.arange(len(text))[None]))
            assert token == int(model.logits(model(torch.tensor([text]), view))[0, -1].argmax())
            text.append(token)


def test_a_hook_that_comes_after_the_adapter_counts_from_the_next_request_on() -> None:
    model = adapted().requires_grad_(False)
    with torch.inference_mode():
        adapter, engine, prompt = Adapter.of(model), Engine(), random_ids(6).tolist()
        how = Sampling(max_new_tokens=1)
        list(engine.run([Request(prompt, how, adapter)]))
        add_hook(model.layers[1].mlp)
        ((_, token), _) = engine.run([Request([*prompt, 7], how, adapter)])
        view = CausalView(model.rotation(torch.arange(7)[None]))
        assert token == int(model.logits(model(torch.tensor([[*prompt, 7]]), view))[0, -1].argmax())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_sharded_base_is_decoded_by_the_modules(device: str) -> None:
    """On CUDA too, although kernels train it: its matrices are whole only within its own passes."""
    model = adapted().requires_grad_(False)
    model.is_sharded = True
    executor = choose(model, "decoding", Setting(torch.device(device), torch.bfloat16))
    assert (executor.name, executor.why_not_fast) == ("modules", "the model is sharded")


def test_training_on_a_cpu_has_no_fast_executor() -> None:
    assert choose(adapted(), "training").name == "modules"
    assert choose(adapted(), "training").why_not_fast is None


@pytest.mark.gpu
@pytest.mark.parametrize("purpose", ["training", "decoding"])
@pytest.mark.parametrize("unknown", UNKNOWN, ids=lambda add: add.__name__)
@pytest.mark.parametrize("place", PLACES)
def test_on_cuda_an_unknown_model_is_left_to_its_modules(
    place: str, unknown: Callable[[nn.Module], None], purpose: Any
) -> None:
    model = adapted(torch.bfloat16).cuda()
    assert choose(model, purpose).name != "modules"
    unknown(PLACES[place](model))
    executor = choose(model, purpose)
    assert executor.name == "modules"
    assert executor.why_not_fast


@pytest.mark.gpu
def test_a_hook_changes_the_loss_on_cuda_too() -> None:
    """As the modules compute it, not as the kernels would without the hook."""
    data = encoded(0, 6, longest=30)
    row = Packer(data, shared_preambles(data), mask_prompt=True, row_tokens=1000).row(list(range(6)))
    model = adapted(torch.bfloat16).cuda()
    add_hook(model.layers[1].mlp)
    ours = float(row_loss(model, row).detach())
    on_cpu = float(row_loss(model.cpu().float(), row).detach())
    assert ours == pytest.approx(on_cpu, rel=2e-2)


def test_a_choice_can_be_made_before_loading() -> None:
    """On the meta device, for a device that need not be there: a CPU decodes this model with its executor."""
    with torch.device("meta"):
        model = Llama(random_llama(0).config).requires_grad_(False)
    setting = Setting(torch.device("cpu"), torch.float32)
    assert choose(model, "training", setting).name == "modules"


def test_an_unknown_child_counts_in_the_logits() -> None:
    """The modules' forward pass calls what was put in; see `test_generate` for decoding."""
    model, ids = adapted(torch.float64), random_ids(1, 7)
    view = CausalView(model.rotation(torch.arange(7)[None]))
    before = model.logits(model(ids, view))
    add_hook(model.layers[1].mlp)
    assert not torch.equal(before, model.logits(model(ids, view)))
