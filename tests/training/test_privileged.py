"""Teachers with a prompt of their own: which it is, what is refused, and what the trainer makes of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_runs import Completions, Kill, build, config, losses, weights

from trb import TRBTrainer, zoo
from trb.errors import InputError
from trb.losses import topk_reverse_kl
from trb.policies import StudentPolicy, TrustRegionPolicy
from trb.sampling import prompt_key, sample, stream_seed
from trb.training.privileged import TeacherPrompts
from trb.training.resume import ChangedRunError
from trb.vocab import align

SHORT = {"max_completion_length": 8, "num_generations": 2, "per_device_train_batch_size": 4}


def rows(count: int = 16, **columns: Any) -> list[dict[str, Any]]:
    """Problems whose teacher's prompt has the answer in it, and now and then more."""
    found = []
    for number, row in enumerate(zoo.problems(count, seed=0, split="train")):
        question = row["prompt"][0]["content"]
        content = f"{question}\n\n{row['answer']}{' look again' * (number % 3)}"
        found.append({**row, "teacher_prompt": [{"role": "user", "content": content}], **columns})
    return found


def rendered(row: dict[str, Any], column: str) -> list[int]:
    _, tokenizer = zoo.load("student")
    ids: Any = tokenizer.apply_chat_template(row[column], add_generation_prompt=True, return_dict=False)
    return list(ids)


def real(inputs: dict[str, Any], name: str, row: int) -> list[int]:
    return inputs[f"{name}_ids"][row][inputs[f"{name}_mask"][row].bool()].tolist()


# ---- which prompt it is ----


def made(row: dict[str, Any], **options: Any) -> Any:
    return TeacherPrompts.of(row.keys(), config(Path("unused"), **options))(row)  # type: ignore[misc]


def test_the_teachers_prompt_is_a_column_or_made_of_one() -> None:
    asked, told = {"role": "user", "content": "1+2"}, {"role": "system", "content": "add"}
    column = [{"role": "user", "content": "1+2 is 3"}]
    assert made({"prompt": [asked], "teacher_prompt": column}) == column
    assert made({"prompt": "1+2", "privileged_context": "3 {prompt}"}) == "1+2\n\n3 {prompt}"
    filled = made(
        {"prompt": [told, asked], "privileged_context": "\\boxed{3}"},
        teacher_prompt_template="{privileged_context}: {prompt} {x}",
    )
    assert filled == [told, {"role": "user", "content": "\\boxed{3}: 1+2 {x}"}]
    whole = {"role": "system", "content": "be brief"}
    assert made({"prompt": [told, asked]}, teacher_system_prompt="be brief") == [whole, asked]
    assert made({"prompt": [asked], "teacher_prompt": column}, teacher_system_prompt="be brief") == [whole, *column]
    assert TeacherPrompts.of(["prompt", "answer"], config(Path("unused"))) is None


def test_the_trainer_composes_as_trls_self_distillation_does(tmp_path: Path) -> None:
    """The column and the template have the names and the meaning of TRL's SDFT."""
    sdft = pytest.importorskip("trl.experimental.sdft")
    from trl.experimental.sdft.sdft_trainer import DemonstrationTeacherContextBuilder

    args = config(tmp_path)
    defaults = {field: sdft.SDFTConfig.__dataclass_fields__[field].default for field in ("teacher_prompt_template",)}
    assert args.teacher_prompt_template == defaults["teacher_prompt_template"]

    class Owner:
        pass

    owner: Any = Owner()
    owner.args = args
    for prompt in ("1+2", [{"role": "system", "content": "add"}, {"role": "user", "content": "1+2"}]):
        theirs = DemonstrationTeacherContextBuilder(owner)._compose_teacher_prompt(prompt, "it is 3")
        assert made({"prompt": prompt, "privileged_context": "it is 3"}) == theirs


# ---- what is drawn, and what is learnt ----


def test_rows_keep_their_teachers_prompt_through_shuffling_and_accumulation(tmp_path: Path) -> None:
    data = rows()
    trainer = build(tmp_path, train_rows=data, gradient_accumulation_steps=2, **SHORT)
    order = list(trainer._get_train_sampler())[:8]
    trainer._prepare_inputs([trainer.train_dataset[index] for index in order])
    taught = {tuple(rendered(row, "prompt")): rendered(row, "teacher_prompt") for row in data}
    seen = [
        (real(inputs, "prompt", row), real(inputs, "teacher_prompt", row))
        for inputs in trainer._buffered_inputs
        for row in range(4)
    ]
    assert all(taught[tuple(own)] == its for own, its in seen)
    assert sorted(own for own, _ in seen) == sorted(rendered(data[index], "prompt") for index in order)
    assert len({len(its) - len(own) for own, its in seen}) > 1
    inputs, decode = trainer._buffered_inputs[0], trainer.processing_class.decode
    trainer._guard.watch(inputs, torch.full((int(inputs["completion_mask"].sum()),), torch.nan))
    skipped = trainer._guard.save(1, ["loss"], 0, decode).read_text().splitlines()
    assert [row["teacher_prompt"] for row in map(json.loads, skipped)] == [decode(its) for _, its in seen[:4]]


def test_completions_are_those_of_the_sampler_with_both_prompts(tmp_path: Path) -> None:
    data = rows()
    for row, other in ((0, 2), (3, 5)):  # another problem altogether
        data[row]["teacher_prompt"] = data[other]["teacher_prompt"]
    trainer = build(tmp_path, train_rows=data, initial_kl_budget=9.0, **SHORT)
    seen = Completions()
    seen.watch(trainer)
    trainer._prepare_inputs([data[index] for index in (0, 0, 3, 3)])
    prompts, taught = ([rendered(data[row], name) for row in (0, 0, 3, 3)] for name in ("prompt", "teacher_prompt"))
    options: dict[str, Any] = {
        "max_new_tokens": 8,
        "eos_token_id": trainer.vocabulary.stop_ids,
        "vocab_size": trainer.vocabulary.size,
        "seed": stream_seed(trainer.args.seed, "train", 0),
        "prompt_keys": [*map(prompt_key, prompts)],
        "rollout_index": [0, 1, 0, 1],
    }
    models = zoo.load("student")[0], zoo.load("teacher")[0]
    wanted = sample(*models, prompts, TrustRegionPolicy(9.0), teacher_prompts=taught, **options)
    assert seen.per_step == [wanted.completions]
    assert sample(*models, prompts, TrustRegionPolicy(9.0), **options).completions != wanted.completions


@pytest.mark.parametrize("method", ["trb", "opd"])
def test_the_loss_is_that_of_the_teacher_after_its_own_prompt(tmp_path: Path, method: str) -> None:
    """With the states that the sampler kept, and in a pass of the loss's own; row by row, without padding."""
    data = rows()
    trainer = build(tmp_path, train_rows=data, temperature=0.7, method=method, **SHORT)
    inputs = trainer._prepare_inputs([data[index] for index in (0, 0, 1, 5)])
    assert (trainer._rollout.teacher_hidden is not None) == (method == "trb")
    loss, _, count = trainer._compute_loss(trainer.model, inputs, None)
    student, teacher = zoo.load("student")[0], zoo.load("teacher")[0]
    stops = student.generation_config.eos_token_id, teacher.generation_config.eos_token_id
    total = {"teacher_prompt": 0.0, "prompt": 0.0}
    for row in range(4):
        completion = real(inputs, "completion", row)
        for read in total:
            logits = []
            for model, prompt in ((student, real(inputs, "prompt", row)), (teacher, real(inputs, read, row))):
                whole = model(input_ids=torch.tensor([prompt + completion])).logits[0] / 0.7
                logits.append(whole[len(prompt) - 1 : -1])
            total[read] += topk_reverse_kl(*align(*logits, *stops), torch.ones(len(completion))).item() * len(
                completion
            )
    assert loss.item() == pytest.approx(total["teacher_prompt"] / count.item(), rel=1e-4)
    assert loss.item() != pytest.approx(total["prompt"] / count.item(), rel=1e-2)


def test_evaluation_and_records_are_of_the_teachers_own_prompt(tmp_path: Path) -> None:
    *trained, a, b, c, d = rows(20)
    trained = [
        {**row, "teacher_prompt": other["prompt"]} for row, other in zip(trained, [*trained[1:], a], strict=True)
    ]
    held_out = [a, b, c, d]
    plain = [{name: row[name] for name in ("prompt", "answer")} for row in held_out]
    found: dict[str, float] = {}
    for name, part, train in (("own", held_out, trained), ("same", plain, [*map(dict, zoo.problems(16, seed=0))])):
        trainer = build(
            tmp_path / name,
            train_rows=train,
            eval_dataset=Dataset.from_list(part),
            recorded_scores_every=1,
            max_steps=1,
            remove_unused_columns=True,  # which must leave the teacher its column
            **SHORT,
        )
        trainer.train()
        found[name] = trainer.evaluate()["eval_loss"]
    assert found["own"] != pytest.approx(found["same"], rel=1e-3)
    recorded, unsaid = (
        [json.loads(line) for line in (tmp_path / name / "rollouts.jsonl").read_text().splitlines()]
        for name in ("own", "same")
    )
    assert all(row["teacher_prompt"] != row["prompt"] for row in recorded)
    assert not any("teacher_prompt" in row for row in unsaid)
    # At every token the teacher's log-probability is that after its own prompt.
    _, tokenizer = zoo.load("student")
    teacher = zoo.load("teacher")[0]
    stop = tokenizer.eos_token_id
    for row in recorded:
        prompt, completion = (tokenizer(row[name])["input_ids"] for name in ("teacher_prompt", "completion"))
        with torch.no_grad():
            logits = teacher(input_ids=torch.tensor([prompt + completion])).logits[0]
        own = logits[:, : trainer.vocabulary.size].log_softmax(-1)
        for place, token in enumerate(completion):
            if token != stop:
                value = own[len(prompt) - 1 + place, token].item()
                assert row["teacher_log_prob"][place] == pytest.approx(value, abs=1e-3)


def test_a_teachers_prefix_is_written_after_its_own_prompt(tmp_path: Path) -> None:
    data = rows()
    runs = {}
    for name, given in (("own", data), ("same", [{**row, "teacher_prompt": row["prompt"]} for row in data])):
        trainer = build(tmp_path / name, train_rows=given, method="prefix", **SHORT)
        seen = Completions()
        seen.watch(trainer)
        trainer._prepare_inputs([given[index] for index in (0, 0, 1, 1)])
        runs[name] = seen.per_step
    assert runs["own"] != runs["same"]


def test_a_student_teaches_itself_on_one_set_of_weights(tmp_path: Path) -> None:
    """The teacher is the student without its adapter, after a prompt of its own: what a copy of it would be."""
    runs = {}
    for name, teacher in (("base", "base"), ("copy", zoo.load("told")[0])):
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        torch.manual_seed(0)
        options = {"peft_config": lora, "train_rows": rows(), "max_steps": 3, "learning_rate": 1e-2, **SHORT}
        trainer = build(tmp_path / name, student=zoo.load("told")[0], teacher=teacher, **options)
        trainer.train()
        runs[name] = losses(trainer)
    assert runs["base"] == pytest.approx(runs["copy"], rel=1e-5)
    assert min(runs["base"]) > 0.01  # the same prompt for both would begin at 0


def test_a_killed_run_resumes_to_the_same_numbers_and_not_with_other_teacher_prompts(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "train_rows": rows(), **SHORT}
    straight = build(tmp_path / "straight", **settings)
    straight.train()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "killed", callbacks=[Kill(3)], **settings).train()
    resumed = build(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(straight)
    assert all(torch.equal(a, b) for a, b in zip(weights(straight).values(), weights(resumed).values(), strict=True))
    other = rows()
    other[3]["teacher_prompt"] = other[4]["teacher_prompt"]
    for changes in ({"train_rows": other}, {"teacher_system_prompt": "look"}):
        with pytest.raises(ChangedRunError, match=r"teacher_prompts|teacher_system_prompt"):
            build(tmp_path / "killed", **{**settings, **changes}).train(resume_from_checkpoint=True)


# ---- what is refused before the first step ----


def text_rows(**changes: Any) -> list[dict[str, Any]]:
    return [{"prompt": "1+2", "answer": "3", **changes}] * 8


def with_row(number: int, **changes: Any) -> list[dict[str, Any]]:
    found = rows(8)
    return [{**row, **(changes if place == number else {})} for place, row in enumerate(found)]


RENDERED = "<|im_start|>user\n1+2<|im_end|>\n<|im_start|>assistant\n"
REFUSED: list[tuple[Sequence[dict[str, Any]], dict[str, Any], str]] = [
    (with_row(3, teacher_prompt=None), {}, r"train_dataset\[3\] has no teacher_prompt"),
    (with_row(2, teacher_prompt=[]), {}, r"train_dataset\[2\] has no teacher_prompt"),
    (
        with_row(1, teacher_prompt=[{"role": None, "content": "1+2"}]),
        {},
        r"the teacher's prompt of train_dataset\[1\] has .* for a prompt; make it text",
    ),
    (
        [{**row, "teacher_prompt": "1+2"} for row in rows(8)],
        {},
        r"teacher's prompt of train_dataset\[0\] is text, and the student's is a list of messages",
    ),
    (
        with_row(5, teacher_prompt=[{"role": "user", "content": "1+" * 300}]),
        {},
        r"the teacher's prompt of train_dataset\[5\] has 6\d\d tokens, .* positions of the teacher",
    ),
    (text_rows(), {"teacher_system_prompt": "add"}, r"train_dataset\[0\] has text .* teacher_system_prompt needs"),
    (
        [{"prompt": [{"role": "user", "content": RENDERED}], "privileged_context": "3"}] * 8,
        {},
        r"train_dataset\[0\] was rendered already",
    ),
    (
        [{"prompt": [{"role": "user", "content": RENDERED}]}] * 8,
        {"teacher_system_prompt": "add"},
        r"rendered already, and other messages \(such as a system prompt\) cannot be put beside it",
    ),
    (text_rows(privileged_context=""), {}, r"train_dataset\[0\] has no privileged_context"),
    (text_rows(privileged_context=[1]), {}, r"train_dataset\[0\] has \[1\] for a privileged_context; make it text"),
    (
        [{"prompt": [{"role": "assistant", "content": "1"}], "privileged_context": "3"}] * 8,
        {},
        r"train_dataset\[0\] has a last message that is no text of the user's",
    ),
]


@pytest.mark.parametrize(("data", "options", "complaint"), REFUSED, ids=range(len(REFUSED)))
def test_prompts_that_a_teacher_cannot_read_are_named(
    tmp_path: Path, data: list[dict[str, Any]], options: dict[str, Any], complaint: str
) -> None:
    trainer = build(tmp_path, train_rows=data, **{**SHORT, **options})
    with pytest.raises(InputError, match=complaint):
        trainer.check_prompts()


def test_a_longer_prompt_of_the_students_alone_is_measured_against_the_student(tmp_path: Path) -> None:
    """A teacher with fewer positions never reads it."""
    teacher = zoo.load("teacher")[0]
    teacher.config.max_position_embeddings = 64
    data = rows(8)
    long = [{"role": "user", "content": "1+" * 40 + "1"}]
    data[2] = {**data[2], "prompt": long}
    build(tmp_path, teacher=teacher, train_rows=data, **SHORT).check_prompts()
    data[2] = {**data[2], "prompt": data[1]["prompt"], "teacher_prompt": long}
    with pytest.raises(InputError, match=r"teacher's prompt of train_dataset\[2\]"):
        build(tmp_path, teacher=teacher, train_rows=data, **SHORT).check_prompts()


def test_options_and_datasets_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"eval_dataset": Dataset.from_list(zoo.problems(4, seed=1))},
            "train_dataset has a column 'teacher_prompt' and eval",
        ),
        ({"train_rows": rows(8, privileged_context="3")}, "two prompts for the teacher"),
        ({"teacher_system_prompt": ""}, "teacher_system_prompt is empty"),
        ({"teacher_system_prompt": "\ud83d"}, "teacher_system_prompt holds half a surrogate pair"),
        ({"chat_template_kwargs": {"who": "\ud83d"}}, "chat_template_kwargs holds half a surrogate pair"),
        ({"teacher_prompt_template": "{prompt}"}, r"has no \{privileged_context\}"),
        ({"use_vllm": True, "vllm_mode": "colocate"}, "set vllm_blended=False"),
    ]
    for changes, complaint in cases:
        with pytest.raises(InputError, match=complaint):
            build(tmp_path, **{"train_rows": rows(8), **SHORT, **changes})


def test_the_student_is_evaluated_and_drawn_without_the_teachers_prompt(tmp_path: Path) -> None:
    """The student's rollouts are those of a run without the column, whatever the teacher reads."""
    data = rows()
    trainer: TRBTrainer = build(tmp_path, train_rows=data, method="opd", **SHORT)
    seen = Completions()
    seen.watch(trainer)
    trainer._prepare_inputs([data[index] for index in (0, 0, 1, 1)])
    prompts = [rendered(data[index], "prompt") for index in (0, 0, 1, 1)]
    alone = sample(
        zoo.load("student")[0],
        None,
        prompts,
        StudentPolicy(),
        max_new_tokens=8,
        eos_token_id=trainer.vocabulary.stop_ids,
        vocab_size=trainer.vocabulary.size,
        seed=stream_seed(trainer.args.seed, "train", 0),
        prompt_keys=[*map(prompt_key, prompts)],
        rollout_index=[0, 1, 0, 1],
    )
    assert seen.per_step == [alone.completions]
