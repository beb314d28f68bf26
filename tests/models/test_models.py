"""Every causal-LM type of transformers is sampled and trained exactly as its own forward pass says, or refused by name.

Twenty families run here; the whole mapping with `pytest -m models`, or in two processes as `make models`, which
writes the table of docs/models.md.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import model_oracle
import pytest
import tiny_models
import torch
import transformers
from model_oracle import examine, find_case, names_type
from tiny_models import MODEL_TYPES, VARIANTS, NotRunnableError, build, is_causal, plain_logits, tiny_config
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from trb.models.modeling import OutputHead, UnsupportedModelError, position_limit
from trb.sampling import Rollout

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "models.json"
# One of every way of attending, placing, windowing, routing and remembering.
QUICK = (
    *("llama", "mistral", "mixtral", "gemma2", "gemma3_text", "phi", "phi3-longrope", "gpt2", "gpt_neo", "gpt_oss"),
    *("bloom", "falcon", "opt", "cohere2", "mamba2", "lfm2", "qwen3_5", "jamba", "deepseek_v3", "bert"),
)

# What counts places, or leaves out states, by an id of the row; and two for which an id is a token.
IDS_QUICK = ("llama", "gemma3_text", "opt", "biogpt", "trocr-sinusoidal", "xlm")


@pytest.mark.parametrize(
    "model_type",
    [*QUICK, *(pytest.param(name, marks=pytest.mark.models) for name in MODEL_TYPES if name not in QUICK)],
)
@pytest.mark.filterwarnings("ignore:::transformers")
def test_a_type_is_exact_or_refused_by_name(model_type: str) -> None:
    finding = examine(model_type)
    assert finding.outcome in ("exact", "refused", "library"), finding.reason
    if model_type in VARIANTS:
        assert finding.outcome == "exact", finding.reason
        return
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if record["provenance"]["versions"]["transformers"] == transformers.__version__:
        recorded = next(row for row in record["types"] if row["model_type"] == model_type)
        assert (finding.outcome, finding.way) == (recorded["outcome"], recorded["way"]), "`make models` records it anew"


@pytest.fixture
def ids_that_mean_something(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Configurations whose padding, first and last ids stand in the prompts of every case."""
    ids = {"pad_token_id": 6, "eos_token_id": 11, "bos_token_id": 3}
    assert set(ids.values()) <= set(chain(*model_oracle.PROMPTS))
    for values in (tiny_models.TINY, *(exception.values for exception in tiny_models._EXCEPTIONS.values())):
        for name, value in ids.items():
            if name in values:
                monkeypatch.setitem(values, name, value)
    sinusoidal = ("trocr", {"use_learned_position_embeddings": False})
    monkeypatch.setitem(VARIANTS, "trocr-sinusoidal", sinusoidal)
    model_oracle.find_case.cache_clear()
    yield
    model_oracle.find_case.cache_clear()


def law_without_padding(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    """The oracle's plain pass, told that no token is padding: XLM would take one of a prompt for it."""
    ids = torch.tensor([list(tokens)])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]


@pytest.mark.parametrize(
    "model_type",
    [
        *IDS_QUICK,
        *(pytest.param(name, marks=pytest.mark.models) for name in MODEL_TYPES if name not in IDS_QUICK),
    ],
)
@pytest.mark.usefixtures("ids_that_mean_something")
@pytest.mark.filterwarnings("ignore:::transformers")
def test_ids_that_pad_begin_and_end_are_tokens_of_a_prompt(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if model_type == "xlm":
        monkeypatch.setattr(model_oracle, "plain_logits", law_without_padding)
    finding = examine(model_type)
    assert finding.outcome in ("exact", "refused", "library"), finding.reason
    if model_type in IDS_QUICK:
        assert finding.outcome == "exact", finding.reason


def test_the_table_names_every_type_and_none_is_wrong() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    outcomes = {row["model_type"]: row["outcome"] for row in record["types"]}
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert {"wrong", "crash"}.isdisjoint(outcomes.values())
    assert list(outcomes.values()).count("exact") >= 110
    for model_type, outcome in outcomes.items():
        assert f"| `{model_type}` |" in page and outcome in page
    if record["provenance"]["versions"]["transformers"] == transformers.__version__:
        assert set(outcomes) == set(MODEL_TYPES)


def test_tiny_models_repeat_and_their_laws_are_peaked() -> None:
    one, two, other = (build("gemma3_text", seed=seed) for seed in (0, 0, 1))
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, two.get_parameter(name)), name
    law_TV = plain_logits(one, range(1, 15)).softmax(-1)
    assert not torch.allclose(law_TV, plain_logits(other, range(1, 15)).softmax(-1), atol=0.1)
    entropy_T = -(law_TV * law_TV.log()).sum(-1)
    assert 0.1 < entropy_T.mean() < 0.8 * torch.tensor(law_TV.shape[-1]).log()


@pytest.mark.parametrize(
    ("model_type", "field"),
    [
        ("qwen2", "sliding_window"),
        ("gemma3_text", "sliding_window"),
        ("mistral", "sliding_window"),
        ("gpt_neo", "window_size"),
        ("llama4_text", "attention_chunk_size"),
    ],
)
def test_windows_are_on_and_prompts_go_past_them(model_type: str, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = model_oracle.PROMPTS[3]
    near_TV = plain_logits(build(model_type), prompt)
    monkeypatch.setitem(tiny_models.TINY, field, 64)
    moved_T = (plain_logits(build(model_type), prompt) - near_TV).abs().amax(-1)
    assert moved_T[: tiny_models.WINDOW].max() == 0
    assert moved_T[tiny_models.WINDOW :].min() > 0.01


def test_every_kind_of_layer_appears_and_is_followed_by_another() -> None:
    assert tiny_config("gemma3_text").layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert set(tiny_config("nemotron_h").layers_block_type) == {"linear_attention", "moe", "full_attention", "mlp"}


def test_a_family_without_a_limit_of_positions_has_none() -> None:
    """XLNet says -1. Its own mask fits no batch of several rows: a refusal, but not for the length of its prompts."""
    assert build("xlnet").config.max_position_embeddings == -1
    assert position_limit(build("xlnet")) is None
    assert position_limit(build("gpt2")) == 128
    assert examine("xlnet").outcome == "refused"


def test_a_model_that_mixes_the_rows_of_a_batch_is_refused_before_training() -> None:
    """Its passes over single rows are right, as are groups of one."""
    model = build("llama")

    def mix(_module: object, _inputs: object, output: BaseModelOutputWithPast) -> BaseModelOutputWithPast:
        output.last_hidden_state = output.last_hidden_state.roll(1, dims=0)
        return output

    model.base_model.register_forward_hook(mix)
    with pytest.raises(UnsupportedModelError, match="off by"):
        OutputHead.check(model)


def test_a_model_that_looks_ahead_is_told_from_one_that_does_not() -> None:
    assert is_causal(build("llama"), range(1, 12))
    assert not is_causal(build("cpmant"), range(1, 12))  # attends to its whole prompt


def test_rows_of_a_case_stop_at_once_later_and_never() -> None:
    case = find_case("llama")
    stopped = [len(tokens) for tokens in case.completions if tokens[-1] == case.stop_id]
    assert min(stopped) == 1 < max(stopped)
    assert any(case.stop_id not in tokens for tokens in case.completions)


def same(_case: model_oracle.Case, rollout: Rollout) -> Rollout:
    return rollout


def another_token(_case: model_oracle.Case, rollout: Rollout) -> Rollout:
    rollout.completions[3][0] = (rollout.completions[3][0] + 1) % tiny_models.VOCABULARY
    return rollout


def another_weight(_case: model_oracle.Case, rollout: Rollout) -> Rollout:
    rollout.stats.teacher_weight[3][0] += 0.01
    return rollout


def an_error(_case: model_oracle.Case, _rollout: Rollout) -> Rollout:
    raise RuntimeError("shapes do not fit")


def a_refusal(case: model_oracle.Case, _rollout: Rollout) -> Rollout:
    raise UnsupportedModelError(case.student, "a test says so")


@pytest.mark.parametrize(
    ("change", "outcome"),
    [(same, "exact"), (another_token, "wrong"), (another_weight, "wrong"), (an_error, "crash"), (a_refusal, "refused")],
)
def test_the_examination_tells_what_is_wrong(
    change: Callable[..., Rollout], outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = model_oracle.sample_case
    monkeypatch.setattr(model_oracle, "sample_case", lambda case, *layout: change(case, sample(case, *layout)))
    assert examine("gpt2").outcome == outcome


def test_a_refusal_names_the_type() -> None:
    model = build("gpt2")
    assert names_type(str(UnsupportedModelError(model, "why")), "gpt2", model)
    assert not names_type("no way of reading this is right", "gpt2", model)


def test_what_the_library_cannot_build_is_its_own_error() -> None:
    with pytest.raises(NotRunnableError, match=r"(?s)musicgen: .*(text_encoder|dropout)"):
        build("musicgen")
    assert examine("musicgen").outcome == "library"
