"""Every causal-LM type of transformers is sampled and trained exactly as its own forward pass says, or refused by name.

About 30 families run here; the whole mapping with `pytest -m models`, or in two processes as `make models`, which
writes the table of docs/models.md.
"""

import json
from pathlib import Path

import model_oracle
import pytest
import tiny_models
import torch
import transformers
from model_oracle import Finding, examine, find_case
from tiny_models import MODEL_TYPES, VARIANTS, NotRunnableError, build, is_causal, plain_logits, tiny_config

import trb.modeling
from trb.sampling import Rollout

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "models.json"
# One of every way of attending, placing, windowing, routing and remembering.
QUICK = (
    *("llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma2", "gemma3_text", "olmo2", "olmo3"),
    *("phi", "phi3", "phi3-longrope", "gpt2", "gpt_neo", "gpt_neox", "gpt_oss", "bloom", "falcon", "opt", "cohere2"),
    *("mamba2", "lfm2", "qwen3_5", "falcon_h1", "jamba", "starcoder2", "deepseek_v3", "bert"),
)


@pytest.mark.parametrize(
    "model_type",
    [*QUICK, *(pytest.param(name, marks=pytest.mark.models) for name in MODEL_TYPES if name not in QUICK)],
)
@pytest.mark.filterwarnings("ignore:::transformers")
def test_a_type_is_exact_or_refused_by_name(model_type: str) -> None:
    finding = examine(model_type)
    assert finding.outcome in ("exact", "refused", "library"), finding.reason
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if record["provenance"]["versions"]["transformers"] == transformers.__version__ and model_type not in VARIANTS:
        recorded = next(row for row in record["types"] if row["model_type"] == model_type)
        assert (finding.outcome, finding.way) == (recorded["outcome"], recorded["way"]), "`make models` writes it anew"


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


@pytest.mark.parametrize("model_type", ["qwen2", "gemma3_text", "olmo3", "mistral", "gpt_neo", "llama4_text"])
def test_windows_are_on_and_cross_the_prompts(model_type: str) -> None:
    """The last token does not see the first, and something else does: a window in front of a layer without one."""
    model = build(model_type)
    tokens = [*model_oracle.PROMPTS[3]]
    changed = [2, *tokens[1:]]
    moved_T = (plain_logits(model, tokens) - plain_logits(model, changed)).abs().amax(-1)
    layers = model.config.num_hidden_layers
    assert moved_T[: tiny_models.WINDOW].min() > 0
    if len(set(getattr(model.config, "layer_types", None) or [])) < 2 and model_type == "mistral":
        assert moved_T[layers * tiny_models.WINDOW :].max() == 0


def test_every_kind_of_layer_appears_and_is_followed_by_another() -> None:
    assert tiny_config("gemma3_text").layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert set(tiny_config("nemotron_h").layers_block_type) == {"linear_attention", "moe", "full_attention", "mlp"}


def test_a_model_that_looks_ahead_is_told_from_one_that_does_not() -> None:
    assert is_causal(build("llama"), range(1, 12))
    assert not is_causal(build("cpmant"), range(1, 12))  # attends to its whole prompt


def test_rows_of_a_case_stop_at_once_later_and_never() -> None:
    case = find_case("llama")
    stopped = [len(tokens) for tokens in case.completions if tokens[-1] == case.stop_id]
    assert min(stopped) == 1 < max(stopped)
    assert any(case.stop_id not in tokens for tokens in case.completions)


def other_token(rollout: Rollout) -> Rollout:
    rollout.completions[3][0] = (rollout.completions[3][0] + 1) % tiny_models.VOCABULARY
    return rollout


def other_weight(rollout: Rollout) -> Rollout:
    rollout.stats.teacher_weight[3][0] += 0.01
    return rollout


def no_change(rollout: Rollout) -> Rollout:
    return rollout


def raises(error: Exception):
    def change(_: Rollout) -> Rollout:
        raise error

    return change


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        (no_change, "exact"),
        (other_token, "wrong"),
        (other_weight, "wrong"),
        (raises(RuntimeError("shapes")), "crash"),
        (raises(trb.modeling.UnsupportedModelError("gpt2: no way of reading it is right")), "refused"),
        (raises(trb.modeling.UnsupportedModelError("no way of reading this is right")), "crash"),
    ],
    ids=["no change", "token", "weight", "error", "refusal", "refusal without the name"],
)
def test_the_examination_finds_what_is_wrong(change, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = model_oracle.sample
    monkeypatch.setattr(model_oracle, "sample", lambda *given, **options: change(sample(*given, **options)))
    assert examine("gpt2").outcome == outcome


def test_what_the_library_cannot_build_is_its_own_error() -> None:
    with pytest.raises(NotRunnableError, match=r"(?s)musicgen: .*text_encoder"):
        build("musicgen")
    assert examine("musicgen").outcome == "library"
    assert isinstance(examine("musicgen"), Finding)
