"""What half precision hides: a way of reading that is wrong at half of the tokens, and the copy that shows it."""

import gc
from collections.abc import Iterator
from functools import wraps
from typing import Any
from weakref import ref

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_models import MODEL_TYPES, build, found_way
from torch import Tensor
from transformers import CONFIG_MAPPING, LlamaConfig, LlamaForCausalLM

from trb.models import comparison, modeling
from trb.models.comparison import disagreement, trials_of
from trb.models.modeling import OutputHead, UnsupportedModelError, check_causal, evaluation_mode, position_limit
from trb.policies import StudentPolicy
from trb.sampling import sample

HALVES = [torch.bfloat16, torch.float16]


class WrongFromCache(LlamaForCausalLM):
    """Rolls its logits at odd positions, when it is read from a cache."""

    @wraps(LlamaForCausalLM.forward)  # what it takes is asked of its signature
    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        cache = options.get("cache", options.get("past_key_values"))
        if cache is not None and options["input_ids"].shape[1] <= 4:
            odd = (options["position_ids"][:, -output.logits.shape[1] :] % 2 == 1)[..., None]
            output.logits = torch.where(odd, output.logits.roll(1, -1), output.logits)
        return output


class LooksAhead(LlamaForCausalLM):
    """Adds to the logits at even positions what it will read next."""

    def forward(self, input_ids: Any = None, **rest: Any) -> Any:
        output = super().forward(input_ids=input_ids, **rest)
        following = input_ids.roll(-1, -1) / output.logits.shape[-1]
        following[:, -1] = 0
        following[:, 1::2] = 0
        output.logits = output.logits + (following[..., None] * 3) * torch.linspace(-1, 1, output.logits.shape[-1])
        return output


def made(kind: type[LlamaForCausalLM], dtype: torch.dtype, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    model = kind(LlamaConfig(**sizes, **special, num_attention_heads=4, num_key_value_heads=4, **options))
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.35)
    return model.to(dtype).eval()


@pytest.fixture(params=["a copy fits", "no memory for a copy"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param != "a copy fits":
        monkeypatch.setattr(comparison, "_free_memory", lambda device: 0)
    yield


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_way_that_is_wrong_at_every_other_token_is_not_taken(memory: None, dtype: torch.dtype) -> None:
    model = made(WrongFromCache, dtype)
    assert found_way(model).name == "whole passes"
    assert found_way(made(LlamaForCausalLM, dtype)).name == "slots"


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_model_that_looks_ahead_at_every_other_token_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedModelError, match="not causal"):
        check_causal(made(LooksAhead, dtype))
    OutputHead.check(made(LlamaForCausalLM, dtype))


def test_what_chance_decides_in_full_precision_is_not_trusted_in_half() -> None:
    """The kernel chooses among keys of tied scores: refused in float64, and in bfloat16 nothing has become exact."""
    for seed in (1, 2):
        with pytest.raises(UnsupportedModelError, match="no way of reading"):
            found_way(build("dots3_note_text", seed=seed).to(torch.bfloat16))


def test_families_that_round_their_states_stay_in_slots() -> None:
    for model_type in ("nemotron_h", "zamba2"):
        assert found_way(build(model_type).to(torch.bfloat16)).name == "slots"


@pytest.mark.parametrize("tied", [True, False])
def test_the_copy_is_the_model_in_float32_and_leaves_it_alone(tied: bool) -> None:
    model = made(LlamaForCausalLM, torch.bfloat16, tie_word_embeddings=tied)
    model.config.dtype = torch.bfloat16
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with trials_of(model) as (own, precise):
        assert own.model is model
        copied = precise.model
        assert {weight.dtype for weight in (*copied.parameters(), *copied.buffers())} == {torch.float32}
        assert (copied.get_output_embeddings().weight is copied.get_input_embeddings().weight) == tied
        assert copied.dtype == copied.config.dtype == torch.float32
        for name, weight in copied.state_dict().items():
            assert torch.equal(weight.bfloat16(), before[name])
        with torch.no_grad():
            for weight in copied.parameters():
                weight.zero_()
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_the_copy_is_gone_after_the_block_whoever_still_holds_the_list() -> None:
    with trials_of(made(LlamaForCausalLM, torch.bfloat16)) as trials:
        copied = ref(trials[1].model)
    gc.collect()
    assert copied() is None and trials == []


def test_full_precision_needs_no_copy_but_under_autocast() -> None:
    model = build("llama").float()
    with trials_of(model) as trials:
        assert [trial.model for trial in trials] == [model]
    with torch.autocast("cpu", dtype=torch.bfloat16), trials_of(model) as trials:
        assert [(trial.model, trial.plain) for trial in trials] == [(model, False), (model, True)]
        with trials[1].precision():
            assert model(input_ids=torch.tensor([[3, 4]])).logits.dtype == torch.float32


def test_in_half_precision_a_share_of_the_tokens_may_be_elsewhere() -> None:
    own = torch.randn(8, 50, generator=torch.Generator().manual_seed(0)).bfloat16()

    def with_wrong(tokens: int) -> list[Tensor]:
        return [torch.cat([own[:tokens].roll(1, -1), own[tokens:]])]

    assert disagreement(with_wrong(4), [own]) == 0
    assert disagreement(with_wrong(5), [own]) > 0.5
    assert disagreement(with_wrong(2), [own], 0.75) == 0
    assert disagreement(with_wrong(3), [own], 0.75) > 0.5
    assert disagreement([one.float() for one in with_wrong(1)], [own.float()]) > 0.5


def test_every_part_is_in_the_mode_that_it_was_in() -> None:
    model = build("llama").train()
    kept = model.model.layers[0].eval()
    sample(model, None, [[3, 4]], StudentPolicy(), max_new_tokens=2, eos_token_id=0, seed=1)
    assert model.training and model.model.layers[1].mlp.training
    assert not any(part.training for part in kept.modules())
    with pytest.raises(RuntimeError), evaluation_mode(model):
        assert not any(part.training for part in model.modules())
        raise RuntimeError
    assert model.training and not kept.training


def test_every_limit_on_positions_is_known_by_its_name() -> None:
    """Over all types: a number that is called a longest length, where no limit is known, would end a run midway."""
    without, seen = [], 0
    for model_type in MODEL_TYPES:
        try:
            config = CONFIG_MAPPING[model_type]().get_text_config()
        except (StrictDataclassError, ValueError):  # of a few types the defaults contradict each other
            continue
        seen += 1
        names = [
            name
            for name in config.to_dict()
            if (name.startswith("max_") and "chunk" not in name) or name in ("n_positions", "n_ctx")
        ]
        known = any(isinstance(getattr(config, name, None), int) for name in modeling._POSITIONS)
        values = {name: getattr(config, name) for name in names if isinstance(getattr(config, name), int)}
        if values and not known:
            without.append((model_type, values))
    assert without == [] and seen > 0.9 * len(MODEL_TYPES)
    assert [position_limit(build(model_type)) for model_type in ("mpt", "whisper")] == [128, 128]
