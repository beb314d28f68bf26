"""A quantised teacher: rollouts have the exact law of its quantised weights, whatever rows stand beside each other.

The exact law is built from plain passes of the quantised model itself. Seeds are fixed; had they been drawn at random,
a correct sampler would fail this file with probability below 1e-3.
"""

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STUDENT_ROWS, TINY, TinyPair, random_model, tiny_llama
from exact_laws import POLICIES
from reference.distributions import Array, shared_events
from reference.sequences import Prefix, enumerate_completions
from reference.statistics import goodness_of_fit
from small_recipes import SMALL_FILE
from tiny_runs import build, losses
from transformers import BitsAndBytesConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from trb import zoo
from trb.cli import main
from trb.errors import InputError, PackageError
from trb.models import quantization
from trb.models.loading import load_model
from trb.models.modeling import UnsupportedModelError, check_causal
from trb.models.quantization import QUANTIZATIONS
from trb.planning import Pair
from trb.sampling import sample

PROMPTS = ((1,), (2, 3, 1), (3, 5, 2, 2, 1))
HORIZON = 3
N = 3_000
LEVEL = 1.2e-5


def installed(name: str) -> str:
    if importlib.util.find_spec(QUANTIZATIONS[name].package) is None:
        pytest.skip(f"needs {QUANTIZATIONS[name].package}")
    return name


@pytest.fixture(scope="module", params=QUANTIZATIONS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    name = installed(request.param)
    folder = tmp_path_factory.mktemp("quantised")
    # As narrow as bitsandbytes' kernels allow.
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=STUDENT_ROWS, **{**TINY, **sizes})
    random_model(Qwen3ForCausalLM, config, seed=69, spread=0.3).float().save_pretrained(folder)
    return TinyPair(tiny_llama(STUDENT_ROWS, seed=41).float(), load_model(str(folder), quantization=name))


def next_events(pair: TinyPair, tokens: Prefix) -> tuple[Array, Array]:
    with torch.no_grad():
        student, teacher = (
            model(input_ids=torch.tensor([tokens])).logits[0, -1].double().numpy()
            for model in (pair.student, pair.teacher)
        )
    return shared_events(student, teacher, pair.student_eos, pair.teacher_eos, 1.0)


@pytest.mark.parametrize("method", ["lockstep", "speculative"])
def test_rollouts_have_the_law_of_the_quantised_weights(pair: TinyPair, method: str) -> None:
    policy, law = POLICIES["budget 0.5"]
    out = sample(
        pair.student,
        pair.teacher,
        [list(prompt) for _ in range(N) for prompt in PROMPTS],
        policy,
        max_new_tokens=HORIZON,
        eos_token_id=pair.student_eos,
        teacher_eos_token_id=pair.teacher_eos,
        seed=7,
        prompt_keys=[10, 11, 12] * N,
        rollout_index=[index for index in range(N) for _ in PROMPTS],
        method=method,
        max_rows=512,
    )
    for row, prompt in enumerate(PROMPTS):
        events = cache(lambda prefix, prompt=prompt: next_events(pair, prompt + prefix))
        exact = enumerate_completions(
            lambda prefix, events=events: events(prefix)[0],
            lambda prefix, events=events: events(prefix)[1],
            law,
            max_new_tokens=HORIZON,
            stop=pair.student_eos,
        )
        drawn = [tuple(completion) for completion in out.completions[row :: len(PROMPTS)]]
        assert goodness_of_fit(drawn, exact) > LEVEL


def test_a_row_does_not_depend_on_the_rows_beside_it(pair: TinyPair) -> None:
    """Not even on one far outside the others' range, which a quantisation of whole batches would scale them by."""
    embeddings = pair.teacher.get_input_embeddings().weight
    rows = embeddings[torch.tensor([[1, 2, 3], [3, 1, 2]])].clone()
    rows[1] *= 100.0
    with torch.no_grad():
        alone, beside = (pair.teacher(inputs_embeds=some).logits[0] for some in (rows[:1], rows))
    bound = 64 * torch.finfo(torch.float16 if alone.dtype == torch.float16 else torch.float32).eps
    torch.testing.assert_close(alone, beside, rtol=bound, atol=bound * float(alone.abs().max()))


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"load_in_8bit": True}, True),
        ({"load_in_8bit": True, "llm_int8_threshold": 3.0}, True),
        ({"load_in_8bit": True, "llm_int8_threshold": 0.0}, False),
        ({"load_in_4bit": True}, False),
        ({}, False),
    ],
)
@pytest.mark.parametrize("saved", [True, False])
def test_a_quantisation_of_whole_batches_is_refused(options: dict[str, Any], refused: bool, saved: bool) -> None:
    """Loaded by the user, or saved so: the configuration is then a mapping."""
    model = tiny_llama(STUDENT_ROWS, seed=41)
    config = BitsAndBytesConfig(**options)
    model.config.quantization_config = config.to_dict() if saved else config
    if not refused:
        check_causal(model)
        return
    with pytest.raises(UnsupportedModelError, match=r"llama .*outliers of a whole batch.*llm_int8_threshold=0\.0"):
        check_causal(model)


def test_a_student_learns_from_it(tmp_path: Path, quantised: PreTrainedModel) -> None:
    trainer = build(tmp_path, teacher=quantised, max_steps=2, blend_warmup_steps=1, max_completion_length=6)
    tokens = torch.arange(8)[None]
    quantised(tokens)  # weights may be packed for this processor at the first pass
    before = quantised(tokens).logits
    trainer.train()
    assert len(losses(trainer)) == 2 and all(loss > 0 for loss in losses(trainer))
    assert torch.equal(quantised(tokens).logits, before)


@pytest.fixture(params=QUANTIZATIONS)
def quantised(request: pytest.FixtureRequest) -> PreTrainedModel:
    return load_model("zoo:teacher", quantization=installed(request.param))


def test_a_recipe_quantises_its_teacher(tmp_path: Path) -> None:
    name = next((name for name, found in QUANTIZATIONS.items() if importlib.util.find_spec(found.package)), None)
    if name is None:
        pytest.skip("needs torchao or bitsandbytes")
    words = [f"--teacher-quantization={name}", "--eval-data=[]", "--quiet", "--output-dir", str(tmp_path / "run")]
    assert main(["train", "--config", small_recipe(tmp_path), *words]) == 0


def small_recipe(folder: Path) -> str:
    (folder / "small.yaml").write_text(SMALL_FILE)
    return str(folder / "small.yaml")


def test_an_unknown_quantization_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"unknown quantization 'bnb4bit'.*did you mean 'bnb-4bit'"):
        load_model("zoo:teacher", quantization="bnb4bit")
    words = ["--config", small_recipe(tmp_path), f"--output-dir={tmp_path / 'run'}"]
    assert main(["train", *words, "--teacher-quantization=int8"]) == 2
    assert "teacher_quantization is 'int8'; choose one of torchao-int8" in capsys.readouterr().err


def test_a_missing_package_is_one_line_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    monkeypatch.setattr("trb.studies.packages.find_spec", lambda name: None)
    with pytest.raises(PackageError, match=r"bnb-8bit needs bitsandbytes: pip install bitsandbytes"):
        load_model("zoo:teacher", quantization="bnb-8bit")
    words = ["--config", small_recipe(tmp_path), "--teacher=no-such-model", f"--output-dir={tmp_path / 'run'}"]
    assert main(["train", *words, "--teacher-quantization=torchao-int8"]) == 2
    assert "teacher_quantization: torchao-int8 needs torchao: pip install torchao" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_plan_counts_its_layers_in_fewer_bytes() -> None:
    """Of the zoo's teacher all but embeddings, head and the last norm lies in layers."""
    student, teacher = zoo.load("student")[0], zoo.load("teacher")[0]
    layers = sum(weight.numel() for name, weight in teacher.named_parameters() if ".layers." in name)
    whole = sum(weight.numel() for weight in teacher.parameters())
    pair = Pair(student, teacher, teacher_dtype="float32", teacher_quantization="bnb-4bit")
    assert pair.teacher_weight_bytes * whole == pytest.approx(0.5 * layers + 4 * (whole - layers))
    assert Pair(student, teacher, teacher_dtype="float32").teacher_weight_bytes == 4
