"""Logits of NaN or infinity: an error that names the model, the row and the position wherever no training step is
there to be skipped, and nothing of it where one is (`test_guard`)."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from trb import zoo
from trb.cli import main
from trb.policies import (
    BehaviorPolicy,
    SKDPolicy,
    StudentPolicy,
    TeacherPolicy,
    TemperaturePolicy,
    TrustRegionPolicy,
)
from trb.sampling import NonFiniteLogitsError, Rollout, sample
from trb.studies import material
from trb.studies.subject import Subject
from trb.tasks.evaluation import evaluate
from trb.tasks.grading import Verifier

BREAKS: dict[str, Callable[[Tensor], Tensor]] = {
    "NaN": lambda logits: logits.masked_fill(torch.arange(logits.shape[-1]) == 5, math.nan),
    "one of +inf": lambda logits: logits.masked_fill(torch.arange(logits.shape[-1]) == 5, math.inf),
    "all of -inf": lambda logits: logits.masked_fill(torch.ones_like(logits, dtype=torch.bool), -math.inf),
    "all of NaN": lambda logits: logits * math.nan,
}
BLEND = TrustRegionPolicy(0.05)


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any, Any]:
    student, tokenizer = zoo.load("student")
    return student, zoo.load("teacher")[0], tokenizer


@pytest.fixture
def breaking() -> Iterator[Callable[..., None]]:
    """Make a model's logits after every token of a kind no law; undone after the test."""
    handles = []

    def start(model: Any, token: int, how: str = "NaN") -> None:
        seen: dict[str, Tensor] = {}

        def note(module: Any, inputs: Any) -> None:
            seen["ids"] = inputs[0]

        def spoil(module: Any, inputs: Any, output: Tensor) -> Tensor:
            hit = (seen["ids"][:, -output.shape[1] :] == token)[..., None]
            return torch.where(hit, BREAKS[how](output), output)

        def spoil_state(module: Any, inputs: Any, output: Tensor) -> Tensor:
            return output.masked_fill((inputs[0] == token)[..., None], math.nan)

        if how == "state":  # and with it all that comes after, as where a layer overflows
            handles.append(model.get_input_embeddings().register_forward_hook(spoil_state))
            return
        handles.append(model.get_input_embeddings().register_forward_pre_hook(note))
        handles.append(model.get_output_embeddings().register_forward_hook(spoil))

    yield start
    for handle in handles:
        handle.remove()


def prompts(tokenizer: Any, count: int = 6) -> list[list[int]]:
    return [tokenizer.encode(row["prompt"][-1]["content"]) for row in zoo.problems(count, seed=3, split="train")]


def draw(pair: tuple[Any, Any, Any], policy: BehaviorPolicy, **options: Any) -> Rollout:
    student, teacher, tokenizer = pair
    settings = {"max_new_tokens": 12, "eos_token_id": tokenizer.eos_token_id, "block_size": 4, **options}
    return sample(student, teacher, prompts(tokenizer), policy, **settings)


def first_uses(rollout: Rollout, token: int) -> set[tuple[int, int]]:
    """Where rows first read a token, and so the next one is drawn without a law."""
    read = [[prompt[-1], *ids[:-1]] for prompt, ids in zip(rollout.prompts, rollout.completions, strict=True)]
    return {(row, ids.index(token)) for row, ids in enumerate(read) if token in ids}


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("method", ["speculative", "lockstep"])
@pytest.mark.parametrize(
    ("policy", "broken"),
    [
        (StudentPolicy(), "student"),
        (TemperaturePolicy(0.7), "student"),
        (BLEND, "student"),
        (BLEND, "teacher"),
        (BLEND, "student and teacher"),
        (SKDPolicy(4, 1.0), "teacher"),
        (TeacherPolicy(), "teacher"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_model_the_row_and_the_position_are_named(
    policy: BehaviorPolicy, broken: str, method: str, how: str, pair: Any, breaking: Any
) -> None:
    whole = draw(pair, policy, method=method)
    token = whole.completions[4][2]
    for name in broken.split(" and "):
        breaking(pair[name == "teacher"], token, how)
    with pytest.raises(NonFiniteLogitsError) as caught:
        draw(pair, policy, method=method)
    assert caught.value.model == broken
    assert (caught.value.row, caught.value.position) in first_uses(whole, token)
    assert f"the {broken}'s logits for token {caught.value.position} of " in str(caught.value)
    assert f"row {caught.value.row} " in str(caught.value)


@pytest.mark.parametrize("method", ["speculative", "lockstep"])
def test_rows_keep_their_numbers_however_they_are_batched(method: str, pair: Any, breaking: Any) -> None:
    student, teacher, tokenizer = pair
    rows = prompts(tokenizer)
    unseen = next(token for token in range(len(tokenizer)) if not any(token in row for row in rows))
    breaking(student, unseen)
    rows[4] = [*rows[4], unseen]
    with pytest.raises(NonFiniteLogitsError, match="student's logits for token 0 of the completion of row 4 are NaN"):
        sample(
            student,
            teacher,
            rows,
            BLEND,
            max_new_tokens=3,
            eos_token_id=tokenizer.eos_token_id,
            method=method,
            max_rows=2,
        )


@pytest.mark.parametrize("method", ["speculative", "lockstep"])
def test_training_may_go_on(method: str, pair: Any, breaking: Any) -> None:
    whole = draw(pair, BLEND, method=method)
    token = whole.completions[4][2]
    breaking(pair[0], token)
    rollout = draw(pair, BLEND, method=method, allow_non_finite=True)
    until = dict(first_uses(whole, token))
    assert 0 < len(until) < len(whole.completions)
    for row, (ids, expected) in enumerate(zip(rollout.completions, whole.completions, strict=True)):
        assert ids[: until.get(row)] == expected[: until.get(row)]


def test_masks_are_no_fault(pair: Any, breaking: Any) -> None:
    """Tokens of -inf, or of a dtype's lowest number, are impossible, not broken."""
    student = pair[0]
    masked = torch.zeros(student.config.vocab_size, dtype=torch.bool)
    masked[[1, 7]] = True
    for value in (-math.inf, torch.finfo(torch.float32).min):
        handle = student.get_output_embeddings().register_forward_hook(
            lambda module, inputs, output, value=value: output.masked_fill(masked, value)
        )
        try:
            assert all(draw(pair, BLEND).completions)
        finally:
            handle.remove()


def test_evaluation_names_the_problem(pair: Any, breaking: Any, tmp_path: Path) -> None:
    student, _, tokenizer = pair
    problems = zoo.problems(6, seed=3, split="train")
    breaking(student, tokenizer.convert_tokens_to_ids("z"), "state")  # no prompt has it
    problems[4]["prompt"][-1]["content"] += "z"
    with pytest.raises(
        NonFiniteLogitsError, match=r"the model's logits for token \d+ of .* problem 5 of 6 of eval are NaN"
    ):
        evaluate(student, tokenizer, problems, n=2, max_new_tokens=4, max_rows=4, progress=False)


@pytest.mark.parametrize("broken", ["student", "teacher"])
def test_a_probe_names_the_model(broken: str, pair: Any, breaking: Any) -> None:
    """Also one that was only asked what it thinks of the other's completions."""
    student, teacher, tokenizer = pair
    problems = zoo.problems(2, seed=3, split="train")
    with Verifier() as verifier:
        subject = Subject(student, teacher, tokenizer, problems, verifier, samples=1, max_new_tokens=8)
        token = subject.rollouts(StudentPolicy()).completions[1][2]
        subject = Subject(student, teacher, tokenizer, problems, verifier, samples=1, max_new_tokens=8)
        breaking(pair[broken == "teacher"], token, "state")
        with pytest.raises(NonFiniteLogitsError, match=f"the {broken}'s logits for token"):
            subject.rollouts(StudentPolicy())


def test_the_command_says_it_in_a_line(
    pair: Any, breaking: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    student = pair[0]
    breaking(student, draw(pair, StudentPolicy()).completions[0][2])
    monkeypatch.setattr(material, "load_model", lambda *arguments, **options: student)
    arguments = [
        "--model",
        "zoo:student",
        "--data",
        "zoo:chains",
        "--limit",
        "8",
        "--max-new-tokens",
        "8",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert main(["eval", *arguments]) == 2
    said = capsys.readouterr().err
    assert "error: the model's logits for token" in said
    assert "Traceback" not in said


# ---- weights ----


def broken_weight(role: str, name: str, row: int, value: float, folder: Path) -> Path:
    model = Path(shutil.copytree(zoo.path(role), folder / role))
    weights = load_file(model / "model.safetensors")
    weights[name][row] = value
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


def commands(folder: Path, **models: Path) -> dict[str, list[str]]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**SHORT, **{role: str(path) for role, path in models.items()}}))
    model = ["--model", str(next(iter(models.values()), "zoo:teacher")), "--data", "zoo:chains", "--limit", "2"]
    return {
        "train": ["train", "--config", str(recipe), "--output-dir", str(folder / "train")],
        "probe": ["probe", "--config", str(recipe), "--output-dir", str(folder / "probe"), *PROBE],
        "eval": ["eval", *model, "--max-new-tokens", "8", "--output-dir", str(folder / "eval")],
    }


PROBE = ["--problems", "2", "--samples", "1", "--max-new-tokens", "8", "--budgets", "0.1", "--truncations", "2"]
SHORT = {
    "student": "zoo:student", "teacher": "zoo:teacher", "train_data": "zoo:chains", "train_limit": 4, "max_steps": 1,
    "prompts_per_step": 2, "num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 8,
    "max_prompt_length": 64, "gradient_checkpointing": False, "save_strategy": "no", "logging_steps": 1,
    "eval_data": "zoo:chains", "eval_limit": 2, "method": "trb", "initial_kl_budget": 0.1, "blend_warmup_steps": 2,
}  # fmt: skip


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    ("role", "name", "row"),
    [
        ("student", "model.norm.weight", 3),
        ("student", "model.embed_tokens.weight", 63),  # never read, but tied to the head
        ("student", "model.layers.0.mlp.down_proj.weight", 0),
        ("teacher", "lm_head.weight", 5),
        ("teacher", "model.norm.weight", 3),
    ],
)
def test_a_broken_weight_is_named_by_every_command(
    role: str, name: str, row: int, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = broken_weight(role, name, row, value, tmp_path)
    for command, arguments in commands(tmp_path, **{role: model}).items():
        assert main([*arguments, "--quiet"]) == 2, command
        said = " ".join(capsys.readouterr().err.split())
        assert f"{name}" in said and str(model) in said, (command, said)
        assert not list(tmp_path.rglob("results.json")) and not list(tmp_path.rglob("probe.json"))


def test_a_broken_weight_that_nothing_reads_changes_nothing(tmp_path: Path) -> None:
    """The last row of the teacher's embeddings: no token has its id, and the head has rows of its own."""
    model = broken_weight("teacher", "model.embed_tokens.weight", 79, math.nan, tmp_path)
    numbers = {}
    for label, models in (("broken", {"teacher": model}), ("whole", {})):
        folder = tmp_path / label
        folder.mkdir()
        for arguments in commands(folder, **models).values():
            assert main([*arguments, "--quiet"]) == 0
        metrics = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
        logged = [
            {key: row[key] for key in ("loss", "grad_norm", "trb/kl_student")} for row in metrics if "loss" in row
        ]
        probed = json.loads((folder / "probe" / "probe.json").read_text())["budgets"]
        scored = json.loads((folder / "eval" / "results.json").read_text())["zoo:chains"]["pass_at_1"]
        numbers[label] = logged, probed, scored
    assert numbers["broken"] == numbers["whole"]
    assert all(map(math.isfinite, numbers["whole"][0][0].values()))
