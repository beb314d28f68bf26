"""`use_vllm=True`: a whole run of the shipped pair, blended inside vLLM and then plain, beside the in-process run."""

import gc
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import torch
from conftest import run_in_two_processes
from peft import LoraConfig
from vllm import SamplingParams
from vllm_helpers import INSIDE, release, shut_down, widened

# isort: split

from tiny_runs import Completions, build, losses

from trb import TRBTrainer, zoo
from trb.policies import StudentPolicy
from trb.sampling.vllm import BlendEngine
from trb.training.vllm import DeferredGeneration

# What vLLM, TRL's check of its version and the torch they drive warn of is theirs to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:TRL currently supports vLLM versions"),
    pytest.mark.filterwarnings("ignore:Exception ignored in. <function Context.__del__"),
]

STEPS, WARMUP = 5, 3


@pytest.fixture
def students(tmp_path: Path) -> Iterator[Any]:
    """Makes fresh copies of the shipped student, its heads widened to what vLLM's kernels take."""
    release()
    directory = tmp_path / "student"
    widened(zoo.load("student")[0]).save_pretrained(directory)

    def fresh() -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)

    yield fresh
    gc.collect()


def run(directory: Path, student: Any, **changes: Any) -> TRBTrainer:
    settings = {"max_steps": STEPS, "blend_warmup_steps": WARMUP, "initial_kl_budget": 0.3, "seed": 3}
    return build(directory, student=student, **{**settings, **changes})


def warm_up(trainer: TRBTrainer, name: str) -> list[float]:
    """A sampler's number of each blended step; plain rollouts have none."""
    return [row[f"trb/{name}"] for row in trainer.state.log_history[:WARMUP]]


def test_the_shipped_student_is_the_same_with_wider_heads(students: Any) -> None:
    original, _ = zoo.load("student")
    ids = torch.randint(3, 60, (4, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (students()(ids).logits - original(ids).logits).abs().max()
    assert difference < 5e-4


def test_a_run_inside_vllm_is_the_run_in_process(
    tmp_path: Path, students: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollouts of the warm-up are the same completions, so its losses are the same; then vLLM has its own noise."""
    engines: list[tuple[int, Any]] = []
    original = BlendEngine.sample

    def watched(self: BlendEngine, *args: Any, **kwargs: Any) -> Any:
        engines.append((inside.state.global_step, self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(BlendEngine, "sample", watched)
    beside = run(tmp_path / "a", students())
    beside.train()
    spread = run(tmp_path / "b", students(), seed=4)
    spread.train()
    inside = run(tmp_path / "c", students(), **INSIDE)
    plain = inside.vllm_generation
    assert isinstance(plain, DeferredGeneration)
    inside.train()
    try:
        assert [step for step, _ in engines] == list(range(WARMUP))
        assert len({id(engine) for _, engine in engines}) == 1
        assert engines[0][1].llm is None, "the blended engine outlived the warm-up"
        assert plain._started
        # The same completions and, from them, the same steps: also proof that each step sampled with its own weights.
        assert losses(inside)[:WARMUP] == pytest.approx(losses(beside)[:WARMUP], rel=1e-4)
        for name in ("accept_rate", "completion_length"):
            assert warm_up(inside, name) == pytest.approx(warm_up(beside, name), rel=1e-6)
        # Where both models agree the weight is anyone's guess, and rounding picks one: hence no closer.
        for name in ("kl_student", "teacher_weight"):
            assert warm_up(inside, name) == pytest.approx(warm_up(beside, name), rel=0.03)
        # Plain rollouts have other noise: as far apart as another seed's, give or take.
        seeds = max(abs(a - b) for a, b in zip(losses(beside), losses(spread), strict=True))
        for ours, theirs in zip(losses(inside)[WARMUP:], losses(beside)[WARMUP:], strict=True):
            assert abs(ours - theirs) <= 3 * seeds
    finally:
        shut_down(inside)


def recorded(directory: Path, name: str) -> list[Any]:
    """A field of every rollout of every step."""
    return [json.loads(line)[name] for line in (directory / "rollouts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("schedule", ["sequence", "gap"])
def test_a_budget_that_sets_itself_is_the_same_inside(tmp_path: Path, students: Any, schedule: str) -> None:
    """The budget of a step comes from what the completions of the steps before have spent.

    With `gap` every fourth rollout of a prompt is the student's own, in the same batch of the same engine.
    """
    own = {"max_steps": WARMUP, "initial_kl_budget": None, "blend_warmup_steps": None, "budget_schedule": schedule}
    own["recorded_rollouts"] = 8  # all of a step
    beside = run(tmp_path / "a", students(), **own)
    beside.train()
    inside = run(tmp_path / "b", students(), **own, **INSIDE)
    inside.train()
    shut_down(inside)
    budgets = warm_up(beside, "kl_budget")
    assert budgets[2] > 1.5 * budgets[0], "nothing was learned from what was spent"
    assert warm_up(inside, "kl_budget") == pytest.approx(budgets, rel=1e-3)
    assert warm_up(inside, "sequence_kl") == pytest.approx(warm_up(beside, "sequence_kl"), rel=1e-3)
    for name in ("tokens", "blended"):
        assert recorded(tmp_path / "b", name) == recorded(tmp_path / "a", name)
    blended = recorded(tmp_path / "b", "blended")
    assert blended == [True, True, True, schedule != "gap"] * 2 * WARMUP
    if schedule == "gap":
        assert warm_up(inside, "share") == [0.75] * WARMUP
        for name in ("teacher_log_prob_blended", "teacher_log_prob_student"):
            assert warm_up(inside, name) == pytest.approx(warm_up(beside, name), rel=1e-3)
    for whether, weights in zip(blended, recorded(tmp_path / "b", "teacher_weight"), strict=True):
        assert (max(weights) > 0) == whether


def test_evaluation_during_the_warm_up_uses_the_engine_that_is_there(tmp_path: Path, students: Any) -> None:
    trainer = run(tmp_path, students(), use_vllm=True, vllm_max_model_length=64)
    trainer.model.eval()
    drawn = trainer._generate_single_turn([[5, 6], [7]], None, {})
    assert trainer._warmup_engine is not None
    engine = trainer._warmup_engine._engine
    assert isinstance(engine, BlendEngine)
    assert drawn == trainer._rollout.completions
    assert trainer._rollout.stats.accepted == [[1.0] * len(row) for row in drawn]
    assert trainer.behavior.at(0).needs_teacher
    assert not StudentPolicy().needs_teacher
    trainer._warmup_engine.release()
    trainer._warmup_engine.release()
    assert engine.llm is None


def test_what_the_deferral_relies_on(tmp_path: Path) -> None:
    from trl.generation.vllm_generation import VLLMGeneration
    from trl.trainer import distillation_trainer

    assert distillation_trainer.VLLMGeneration is VLLMGeneration
    assert "self._init_vllm()" in inspect.getsource(VLLMGeneration.__init__).splitlines()[-1]
    assert list(inspect.signature(VLLMGeneration.sync_weights).parameters) == ["self"]
    assert list(inspect.signature(VLLMGeneration._iter_named_params).parameters) == ["self"]
    used = inspect.getsource(distillation_trainer).count("self.vllm_generation.")
    known = ("sync_weights()", "generate(", "llm.llm_engine.model_config.max_model_len")
    assert used == sum(inspect.getsource(distillation_trainer).count(f"self.vllm_generation.{name}") for name in known)


def test_adapters_are_merged_for_the_engine(tmp_path: Path, students: Any) -> None:
    """LoRA: the engine samples with the adapted weights of each step, and training goes on with unmerged ones."""
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    drawn, found = [], []
    for name, changes in (("beside", {}), ("frozen", {"learning_rate": 0.0}), ("inside", INSIDE)):
        settings = {"max_steps": WARMUP, "learning_rate": 1e-2, **changes}
        trainer = run(tmp_path / name, students(), peft_config=adapter, **settings)
        completions = Completions()
        completions.watch(trainer)
        trainer.train()
        drawn.append(completions.per_step)
        found.append(losses(trainer))
    beside, frozen, inside = drawn
    assert inside == beside
    assert found[2] == pytest.approx(found[0], rel=1e-3)  # merging and taking apart rounds the weights
    assert frozen[0] == beside[0], "before the first step the adapter does nothing"
    assert all(kept != moved for kept, moved in zip(frozen[1:], beside[1:], strict=True))


def test_plain_rollouts_follow_a_head_tied_to_the_embeddings(tmp_path: Path, students: Any) -> None:
    """TRL's engine draws the likeliest tokens of the student as it is, not as it was when the engine started."""
    trainer = run(tmp_path, students(), method="opd", max_steps=1, use_vllm=True)
    student = trainer.model.eval()
    assert student.config.tie_word_embeddings
    prompts = [[5, 6, 7], [8, 9], [20, 21, 22, 23]]

    def likeliest(model: Any) -> list[int]:
        with torch.no_grad():
            return [int(model(torch.tensor([prompt])).logits[0, -1].argmax()) for prompt in prompts]

    trainer.train()
    before = likeliest(student)
    embeddings = student.get_input_embeddings().weight
    with torch.no_grad():
        embeddings.normal_(std=float(embeddings.std()), generator=torch.Generator().manual_seed(0))
    try:
        trainer.vllm_generation.sync_weights()
        outputs = trainer.vllm_generation.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0.0, max_tokens=1, detokenize=False),
            use_tqdm=False,
        )
        assert [output.outputs[0].token_ids[0] for output in outputs] == likeliest(student.eval())
        assert likeliest(student) != before
    finally:
        shut_down(trainer)


def test_plain_rollouts_are_of_rows_that_the_pair_shares(tmp_path: Path) -> None:
    """The student's head has sixteen rows more than the teacher's, which it gives a good part of its probability."""
    release()
    directory = tmp_path / "student"
    wide = widened(zoo.load("student")[0])
    wide.resize_token_embeddings(96, mean_resizing=False)
    with torch.no_grad():
        embeddings = wide.get_input_embeddings().weight
        embeddings[80:] = 1.5 * embeddings[5:21]
    wide.save_pretrained(directory)
    student = type(wide).from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    ids = torch.tensor([[5, 6, 7], [9, 8, 7]])
    with torch.no_grad():
        assert student(ids).logits.softmax(-1)[..., 80:].sum(-1).mean() > 0.2
    trainer = run(tmp_path, student, method="opd", max_steps=1, use_vllm=True)
    seen = Completions()
    seen.watch(trainer)
    try:
        trainer.train()
        drawn = [token for completion in seen.per_step[0] for token in completion]
        assert len(drawn) > 8 and max(drawn) < 80
    finally:
        shut_down(trainer)


def test_two_processes_have_an_engine_each(tmp_path: Path, students: Any) -> None:
    """Under DDP, with engines split over both, and under FSDP2: every process draws what it draws without an engine.

    DDP goes on for a step after the warm-up: that one is TRL's engine's, with its own noise.
    """
    students().save_pretrained(tmp_path / "student")
    scenarios = {"ddp": "DistributedDataParallel", "tensor-parallel": "DistributedDataParallel", "fsdp2": "FSDP"}
    run_in_two_processes("vllm_worker.py", tmp_path / "student", tmp_path, *scenarios, timeout=900)
    for name, wrapper in scenarios.items():
        found = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
        for each in found:
            assert each["in_vllm"]["processes"] == 2
            assert each["in_vllm"]["wrapper"].startswith(wrapper)
            drawn, expected = each["in_vllm"]["drawn"], each["in_process"]["drawn"]
            assert len(drawn) == WARMUP + (name == "ddp")
            assert drawn[:WARMUP] == expected[:WARMUP]
            assert [len(rows) for rows in drawn] == [len(rows) for rows in expected]
            assert each["in_vllm"]["losses"][:WARMUP] == pytest.approx(each["in_process"]["losses"][:WARMUP], rel=1e-4)
        first, second = (each["in_vllm"]["drawn"] for each in found)
        assert first != second, "both processes were given the same prompts"


def test_a_student_unlike_its_checkpoint_is_refused(tmp_path: Path, students: Any) -> None:
    student = students()
    path = Path(student.name_or_path) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}))
    with pytest.raises(ValueError, match=r"which has 3 layers; the student was pruned to 2: save the student"):
        run(tmp_path, student, use_vllm=True)
    student.name_or_path = ""
    with pytest.raises(ValueError, match="this student has none: save the student"):
        run(tmp_path, student, use_vllm=True)


def test_engines_shared_by_more_processes_than_there_are_are_refused(tmp_path: Path, students: Any) -> None:
    with pytest.raises(ValueError, match=r"vllm_tensor_parallel_size=2 does not divide the number of processes, 1"):
        run(tmp_path, students(), use_vllm=True, vllm_tensor_parallel_size=2)
