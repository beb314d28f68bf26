"""Packed weights: the same products within the rounding of their dtype, as long as they are wanted and no longer."""

import copy
from collections.abc import Iterator

import psutil
import pytest
import torch
from conftest import TinyPair
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from trb.policies import StudentPolicy, TrustRegionPolicy
from trb.sampling import packing, sample
from trb.sampling.packing import packed_products

needs_packing = pytest.mark.skipif(
    not packing._works(torch.float32, torch.float32), reason="torch has no packed products here"
)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small a model is, and however short a call."""
    monkeypatch.setattr(packing, "_LARGE", 0)
    monkeypatch.setattr(packing, "_FEWEST_TOKENS", 0)


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 80)


def replaced(model: nn.Module, tokens: int = 100) -> list[nn.Module]:
    with torch.no_grad(), packed_products(model, tokens=tokens):
        return [module for module in model.modules() if "forward" in vars(module)]


@needs_packing
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (300, 48), (3, 5, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_the_layer(always: None, bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, states = nn.Linear(48, 80, bias=bias), torch.randn(shape)
    exact = nn.functional.linear(states.double(), layer.weight.double(), layer.bias.double() if bias else None)
    with torch.no_grad(), packed_products(layer, tokens=100):
        assert "forward" in vars(layer)
        found = layer(states)
    assert found.shape == exact.shape and found.dtype == torch.float32
    # A sum of 48 products, each the size of a normal number over the root of 48, and rounded once.
    assert (found - exact).abs().max() <= 48 * torch.finfo(torch.float32).eps * exact.abs().max()


@needs_packing
def test_under_autocast_they_are_in_its_dtype(always: None, layer: nn.Linear) -> None:
    states = torch.randn(4, 48)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(states)
        with packed_products(layer, tokens=100):
            found = layer(states)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(found, expected, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=1e-3)


@needs_packing
def test_a_layer_is_as_it_was_afterwards(always: None, layer: nn.Linear) -> None:
    states, seen = torch.randn(4, 48), list[Tensor]()
    layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with pytest.raises(KeyError), torch.no_grad(), packed_products(layer, tokens=100):
        layer(states)
        raise KeyError
    assert "forward" not in vars(layer)
    assert len(seen) == 1  # hooks run as ever
    with torch.no_grad():
        layer.weight.zero_()
        assert torch.equal(layer(states), layer.bias.expand(4, -1))


class _Own(nn.Linear):
    """A layer of somebody else's."""


@needs_packing
def test_what_is_left_alone(always: None, layer: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    assert replaced(layer) == [layer]
    assert replaced(_Own(48, 80)) == []
    assert replaced(nn.Linear(48, 80, dtype=torch.float64)) == []
    assert replaced(nn.Linear(48, 80, device="meta")) == []
    wrapped = nn.Linear(48, 80)
    wrapped.forward = lambda states: states  # type: ignore[method-assign]
    with packed_products(wrapped, tokens=100):
        assert wrapped(torch.ones(3)).tolist() == [1, 1, 1]
    assert "forward" in vars(wrapped)
    total = psutil.virtual_memory().total
    monkeypatch.setattr(packing, "_SHARE", (layer.weight.numel() * 4 - 1) / total)
    assert replaced(layer) == []
    assert replaced(nn.Sequential(layer, layer)) == []


@needs_packing
def test_small_models_and_short_calls_are_not_worth_it(layer: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    assert replaced(layer) == []
    monkeypatch.setattr(packing, "_LARGE", 1)
    assert replaced(layer, tokens=15) == []
    assert replaced(layer, tokens=16) == [layer]


@pytest.fixture
def of_another_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    packing._works.cache_clear()
    yield
    packing._works.cache_clear()


@pytest.mark.parametrize("fault", ["fails", "is wrong"])
def test_operators_that_do_not_work_are_not_used(
    fault: str, always: None, of_another_torch: None, layer: nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(layer: nn.Linear) -> object:
        if fault == "fails":
            raise NotImplementedError("Could not run 'mkldnn::_reorder_linear_weight'")
        return lambda states: 1.01 * nn.functional.linear(states, layer.weight, layer.bias)

    monkeypatch.setattr(packing, "_packed", other)
    assert replaced(layer) == []


@needs_packing
def test_samples_are_those_of_the_layers_themselves(always: None, tiny_pair: TinyPair) -> None:
    """Both models, hidden states kept; and the reference sampler, which packs nothing."""
    models = [copy.deepcopy(model).float() for model in (tiny_pair.student, tiny_pair.teacher)]
    options = {
        "max_new_tokens": 8,
        "eos_token_id": tiny_pair.student_eos,
        "teacher_eos_token_id": tiny_pair.teacher_eos,
    }
    prompts = [[1], [2, 3, 1], [3, 5, 2, 2, 1]] * 20
    for policy in (StudentPolicy(), TrustRegionPolicy(0.2)):
        packed = sample(*models, prompts, policy, **options, keep_teacher_hidden=policy.needs_teacher)
        plain = sample(*models, prompts, policy, **options, method="lockstep")
        assert packed.completions == plain.completions


@needs_packing
def test_a_model_that_trains_goes_on_training() -> None:
    """Gradients pass through the layers as ever once a call is over."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40_000, hidden_size=512, intermediate_size=64, num_hidden_layers=1))
    assert len(replaced(model)) == 8
    model(torch.tensor([[1, 2]])).logits.sum().backward()
    assert model.lm_head.weight.grad is not None
