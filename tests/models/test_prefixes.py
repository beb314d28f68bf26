"""Prompts read once for all of their completions: states and gradients are those of rows that are read whole."""

from typing import Any

import pytest
import torch
from test_modeling import ARCHITECTURES, build
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from trb.models import prefixes
from trb.models.modeling import completion_hidden_states, length_groups
from trb.models.prefixes import shared_hidden_states

FOUR, ONE = [3, 4, 5, 6], [9]
PROMPTS = [FOUR, ONE, [1, 2, 3, 8], FOUR, ONE, FOUR, [5, 5]]
COMPLETIONS = [[7, 8], [10, 11, 2, 3, 4], [5], [], [1, 2, 3], [6], [2, 2]]


def batch(prompts: list[list[int]], completions: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts padded on the left, completions on the right."""
    wide, long = max(map(len, prompts)), max(map(len, completions))
    ids, mask, chosen = torch.zeros(3, len(prompts), wide + long, dtype=torch.long)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids[row, wide - len(prompt) : wide + len(completion)] = torch.tensor(prompt + completion)
        mask[row, wide - len(prompt) : wide + len(completion)] = 1
        chosen[row, wide : wide + len(completion)] = 1
    return ids, mask, chosen


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows are read in the new way whatever it saves; receives how many tokens each pass read."""
    tokens: list[int] = []
    plain = prefixes._pass

    def counted(base: PreTrainedModel, ids_RL: Tensor, *rest: Any) -> Tensor:
        tokens.append(ids_RL.numel())
        return plain(base, ids_RL, *rest)

    monkeypatch.setattr(prefixes, "_pass", counted)
    monkeypatch.setattr(prefixes, "_pays", lambda *_: True)
    return tokens


def read(model: PreTrainedModel, reads: Any, *rows: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The states, and the gradients of a sum of them in which each counts differently."""
    states = reads(model, *rows)
    weights = torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states).sin()
    parameters = [parameter for parameter in model.base_model.parameters() if parameter.requires_grad]
    return states, [*torch.autograd.grad((states * weights).sum(), parameters)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_states_and_gradients_are_those_of_whole_rows(name: str, shared: list[int]) -> None:
    model, rows = build(name), batch(PROMPTS, COMPLETIONS)
    ours, whole = read(model, shared_hidden_states, *rows), read(model, completion_hidden_states, *rows)
    assert shared
    assert torch.allclose(ours[0], whole[0], atol=1e-12)
    for one, other in zip(ours[1], whole[1], strict=True):
        # Where norms are taken in float32, whatever the weights are, their gradients are rounded so.
        assert torch.allclose(one, other, atol=16 * torch.finfo(torch.float32).eps * float(other.abs().max()))


def test_each_prompt_is_read_once_and_no_last_token(shared: list[int]) -> None:
    model = build("llama")
    shared_hidden_states(model, *batch([FOUR] * 4, [[7, 8, 9], [7, 8], [1], [2, 2, 2]]))
    del shared[:-5]  # those of the comparison that comes before the first time
    # Four rows are read one by one, as whole ones would be; of a completion of one token nothing is left to read.
    assert shared[-4:] == [4, 1, 2, 2]


def test_tokens_that_tools_wrote_predict_nothing(shared: list[int]) -> None:
    model, (ids, mask, chosen) = build("llama"), batch([FOUR, FOUR], [[7, 8, 1, 2, 9], [7, 8, 3, 3]])
    chosen[0, 6:8] = chosen[1, 7] = 0
    ours, whole = (reads(model, ids, mask, chosen) for reads in (shared_hidden_states, completion_hidden_states))
    assert torch.allclose(ours, whole, atol=1e-12)
    assert len(ours) == int(chosen.sum()) == 6


@pytest.mark.parametrize("empty", [[[], []], [[], [4]]])
def test_rows_without_a_completion(empty: list[list[int]], shared: list[int]) -> None:
    model, rows = build("llama"), batch([FOUR, FOUR], empty)
    assert len(shared_hidden_states(model, *rows)) == sum(map(len, empty))


def passes(model: PreTrainedModel) -> list[int]:
    seen: list[int] = []
    model.base_model.register_forward_hook(lambda *_: seen.append(1))
    return seen


def test_it_is_done_where_it_saves_a_tenth_and_passes_are_wide() -> None:
    model = build("llama")
    shared_hidden_states(model, *batch([[1] * 20] * 64, [[2] * 9] * 64))  # the comparison, once
    seen = passes(model)
    for prompts, completions, expected in (
        ([[1] * 20] * 64, [[2] * 9] * 64, 5),  # one prompt, four parts of sixteen rows
        ([[1] * 20] * 8, [[2] * 9] * 8, 4),  # too few tokens a pass
        ([[row % 16] * 20 for row in range(16)], [[2] * 9] * 16, 4),  # nothing in common
        ([[1]] * 64, [[2] * 30] * 64, 4),  # next to nothing
    ):
        seen.clear()
        shared_hidden_states(model, *batch(prompts, completions))
        assert len(seen) == expected


def test_on_accelerators_no_more_passes_than_whole_rows_take() -> None:
    one, two = (prefixes._rows(*batch([*prompts] * 4, [[2] * 9] * 8)) for prompts in ([FOUR, FOUR], [FOUR, FOUR + ONE]))
    assert length_groups(8) == 4
    for rows, at_once, pays in ((one, 4, True), (one, 2, False), (two, 2, False)):
        assert prefixes._pays(rows, list(prefixes._groups(rows, at_once)), 1000, "cuda") is pays


@pytest.mark.parametrize(("width", "tokens", "pays"), [(4096, 900, True), (64, 900, False), (10**6, 12_000, False)])
def test_long_completions_are_read_whole(width: int, tokens: int, pays: bool) -> None:
    """Attention after a prompt computes its masked half too, with a mask: that must be little, and small."""
    rows = prefixes._rows(*batch([[1] * 600] * 4, [[2] * tokens] * 4))
    assert prefixes._pays(rows, list(prefixes._groups(rows, 1)), width, "cpu") is pays


def with_dropout(model: PreTrainedModel) -> None:
    model.config.attention_dropout = 0.1
    model.train()


def with_adapter_dropout(model: PreTrainedModel) -> None:
    model.extra = nn.Dropout(0.1)
    model.train()


def with_checkpointing(model: PreTrainedModel) -> None:
    # transformers 5.24 renamed it.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()


def with_jitter(model: PreTrainedModel) -> None:
    model.config.router_jitter_noise = 0.3
    model.train()


def with_dropped_modules(model: PreTrainedModel) -> None:
    model.base_model.layers[0].module_dropout = {"default": 0.5}
    model.train()


def with_a_wrapper(model: PreTrainedModel) -> None:
    model.base_model.layers[0] = checkpoint_wrapper(model.base_model.layers[0])
    model.train()


@pytest.mark.parametrize(
    "make",
    [with_dropout, with_adapter_dropout, with_jitter, with_dropped_modules, with_checkpointing, with_a_wrapper],
)
def test_what_cannot_be_shared_is_read_whole(make: Any, shared: list[int]) -> None:
    model, rows = build("llama"), batch([FOUR] * 4, [[7, 8]] * 4)
    make(model)
    shared_hidden_states(model, *rows)
    assert not shared
    model.eval()
    shared_hidden_states(model, *rows)
    assert shared


@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_layers_are_read_whole(in_place: bool) -> None:
    model = build("llama")
    assert prefixes._may_share(model)
    layers = model.base_model.layers
    if in_place:
        layers[0].compile(backend="eager")
    else:
        layers[0] = torch.compile(layers[0], backend="eager")
    assert not prefixes._may_share(model)


def test_a_model_that_cannot_go_on_from_a_cache_is_read_whole(
    shared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = build("llama"), batch([FOUR] * 4, [[7, 8]] * 4)

    def fails(*_: Any) -> Any:
        raise ValueError("Cannot call `update_indexer` on layer 0 which is a DynamicLayer")

    monkeypatch.setattr(prefixes, "_for_rows", fails)
    assert torch.equal(shared_hidden_states(model, *rows), completion_hidden_states(model, *rows))


def test_a_model_whose_cache_gives_other_states_is_read_whole(
    shared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=19, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    ).eval()
    plain = prefixes._for_rows

    def worse(prompts: Any, places: list[int]) -> Any:
        cache = plain(prompts, places)
        cache.layers[0].keys = cache.layers[0].keys * 2
        return cache

    monkeypatch.setattr(prefixes, "_for_rows", worse)
    rows = batch([FOUR] * 4, [[7, 8]] * 4)
    ours = shared_hidden_states(model, *rows)
    monkeypatch.undo()
    assert shared  # it was tried, on the rows of the comparison
    assert torch.equal(ours, completion_hidden_states(model, *rows))
