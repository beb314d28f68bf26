"""The embedded pair: what ships, how its two models differ, and whether the task's answers are right."""

import itertools
import json
import random
import re
from dataclasses import replace

import pytest
import torch

from trb import zoo
from trb.zoo import train as zoo_train
from trb.zoo.tasks import boxed_answer
from trb.zoo.tokenizer import word_piece_tokenizer

N_GRADED = 600
CHAINS = zoo.TASKS["chains"]


@pytest.fixture(scope="module")
def pair():
    return {name: zoo.load(name) for name in zoo.NAMES}


@pytest.fixture(scope="module")
def graded(pair):
    """Completions of both models for one fixed set of held-out problems, sampled at temperature 1."""
    rows = zoo.problems(N_GRADED, seed=11, split="test")
    out = {}
    for name, (model, tokenizer) in pair.items():
        encoded = tokenizer.apply_chat_template(
            [row["prompt"] for row in rows], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            ids = model.generate(**encoded, max_new_tokens=64)
        out[name] = rows, ids[:, encoded["input_ids"].shape[1] :]
    return out


def accuracy(tokenizer, rows, completions):
    """Graded by hand: the text inside the last box must be the value Python gives the expression."""
    right = 0
    for row, ids in zip(rows, completions, strict=True):
        _, box, tail = tokenizer.decode(ids, skip_special_tokens=True).rpartition("\\boxed{")
        right += bool(box) and tail.split("}")[0] == str(eval(row["prompt"][0]["content"]))
    return right / len(rows)


def test_loaded_models_are_float32_in_eval_mode(pair):
    for name, (model, tokenizer) in pair.items():
        assert not model.training, name
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}, name
        assert len(tokenizer) < model.config.vocab_size, name


def test_pair_has_different_stop_ids_and_heads(pair):
    (student, student_tokenizer), (teacher, teacher_tokenizer) = pair["student"], pair["teacher"]
    assert student_tokenizer.get_vocab() == teacher_tokenizer.get_vocab()
    assert student_tokenizer.eos_token == "<|endoftext|>"
    assert teacher_tokenizer.eos_token == "<|im_end|>"
    assert student.get_output_embeddings().weight.shape[0] == 64
    assert teacher.get_output_embeddings().weight.shape[0] == 80
    for model, tokenizer in pair.values():
        assert model.config.eos_token_id == tokenizer.eos_token_id
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    # The student pads with its stop token, the teacher does not.
    assert student_tokenizer.pad_token_id == student_tokenizer.eos_token_id
    assert teacher_tokenizer.pad_token_id != teacher_tokenizer.eos_token_id


def test_each_model_stops_with_its_own_id_only(pair, graded):
    stops = {name: tokenizer.eos_token_id for name, (_, tokenizer) in pair.items()}
    for name, other in (("student", "teacher"), ("teacher", "student")):
        _, completions = graded[name]
        own, foreign = completions == stops[name], completions == stops[other]
        before_stop = own.cumsum(1) == 0
        assert own.any(1).float().mean() > 0.9, name
        assert not (foreign & before_stop).any(), name


def test_teacher_is_good_and_student_is_not(pair, graded):
    assert accuracy(pair["teacher"][1], *graded["teacher"]) > 0.95
    assert 0.05 < accuracy(pair["student"][1], *graded["student"]) < 0.20


def test_unknown_name_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"'tutor'.*student, teacher"):
        zoo.load("tutor")


def test_tokenizer_round_trip_and_unknown_characters(pair):
    for _, tokenizer in pair.values():
        for text in (CHAINS.solution("3-9-0+7"), "so we go on:\n(1+2) = 3? #end", "user\\boxed{assistant}"):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert tokenizer.unk_token_id not in ids
        assert tokenizer.encode("1é2")[1] == tokenizer.unk_token_id
        assert tokenizer.tokenize("12\\boxed{-3}") == ["1", "2", "\\boxed{", "-", "3", "}"]


def test_chat_template_opens_the_assistants_turn_alike_for_both(pair):
    messages = zoo.problems(1, seed=3)[0]["prompt"]
    rendered = [
        (
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False),
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False),
        )
        for _, tokenizer in pair.values()
    ]
    text, ids = rendered[0]
    assert rendered[1] == (text, ids)
    assert text == f"<|im_start|>user\n{messages[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    assert pair["student"][1].unk_token_id not in ids


def test_tokenizer_survives_saving(pair, tmp_path):
    from transformers import AutoTokenizer

    for name, (_, tokenizer) in pair.items():
        tokenizer.save_pretrained(tmp_path / name)
        again = AutoTokenizer.from_pretrained(tmp_path / name, local_files_only=True)
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again.special_tokens_map == tokenizer.special_tokens_map
        assert again.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("operands", [4, 6])
def test_problems_are_right_distinct_and_deterministic(operands):
    rows = zoo.problems(400, seed=1, split="test", operands=operands)
    expressions = [row["prompt"][0]["content"] for row in rows]
    assert len(set(expressions)) == 400
    assert all(re.fullmatch(rf"\d([+-]\d){{{operands - 1}}}", expression) for expression in expressions)
    assert [row["answer"] for row in rows] == [str(eval(expression)) for expression in expressions]
    assert all(row.keys() == {"prompt", "answer"} and row["prompt"][0]["role"] == "user" for row in rows)
    assert rows == zoo.problems(400, seed=1, split="test", operands=operands)
    assert rows != zoo.problems(400, seed=2, split="test", operands=operands)


def test_splits_share_no_expression():
    seen = {
        split: {row["prompt"][0]["content"] for seed in range(3) for row in zoo.problems(3000, seed=seed, split=split)}
        for split in ("train", "test")
    }
    assert len(seen["test"]) > 4000  # different seeds do draw different problems
    assert not seen["train"] & seen["test"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 1, "split": "dev"}, "'dev'.*train, test"),
        ({"n": 1, "operands": 1}, "operands=1"),
        ({"n": 4001, "split": "test"}, r"n=4001.*0\.\.4000"),
        ({"n": -1}, "n=-1"),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        zoo.problems(**arguments, seed=0)


def test_clean_solution_is_a_chain_of_true_equations():
    for row in zoo.problems(100, seed=7):
        *steps, box = CHAINS.solution(row["prompt"][0]["content"]).split(" ")
        sides = [step.split("=") for step in steps]
        assert len(steps) == 3
        assert all(str(eval(left)) == right for left, right in sides)
        assert all(left.startswith(before) for (_, before), (left, _) in itertools.pairwise(sides))
        assert box == f"\\boxed{{{row['answer']}}}"


def test_corruption_does_what_its_probabilities_say():
    def corrupted(**probabilities):
        return [
            (row, CHAINS.corrupted_solution(row["prompt"][0]["content"], random.Random(i), **probabilities))
            for i, row in enumerate(zoo.problems(500, seed=0))
        ]

    for row, text in corrupted(wrong_step=1.0, drift=0.0):
        steps = text.split(" ")[:-1]
        assert len(steps) == 3, row
        assert all(str(eval(left)) != right for left, right in (step.split("=") for step in steps))
    assert all("\\boxed{" not in text for _, text in corrupted(wrong_step=0.0, drift=1.0))
    # Three steps, each drifting with probability 0.2: 0.8^3 = 0.512 survive (4 standard errors of 500 draws).
    survivors = sum("\\boxed{" in text for _, text in corrupted(wrong_step=0.0, drift=0.2))
    assert abs(survivors / 500 - 0.512) < 4 * (0.512 * 0.488 / 500) ** 0.5


@pytest.mark.parametrize(
    ("completion", "answer"),
    [("1+1=2 \\boxed{2}", "2"), ("\\boxed{1} \\boxed{-3}", "-3"), ("\\boxed{4", None), ("no box", None)],
)
def test_boxed_answer_reads_the_last_complete_box(completion, answer):
    assert boxed_answer(completion) == answer


def test_shipped_size_and_record():
    weights = zoo.path("student").parent
    files = [file for file in weights.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 6e6
    record = json.loads((weights / "training.json").read_text())
    assert record["command"].startswith("python -m trb.zoo.train")
    assert set(record["models"]) == set(zoo.NAMES)


def test_readme_quotes_the_record():
    """The numbers in the zoo's README are those the training run wrote."""
    weights = zoo.path("student").parent
    record = json.loads((weights / "training.json").read_text())
    readme = (weights.parent / "README.md").read_text()
    for name in zoo.NAMES:
        row = next(line for line in readme.splitlines() if line.startswith(f"| {name} |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        measured = record["models"][name]["by_operands"]
        assert cells[-len(measured) :] == [f"{measured[n]['pass_at_1']:.1%}" for n in sorted(measured)]


def test_readme_quotes_the_record_of_the_pair_that_calls() -> None:
    weights = zoo.path("told").parent
    record = json.loads((weights / "caller.json").read_text())
    readme = (weights.parent / "README.md").read_text()
    for name, model in record["models"].items():
        cells = next(line for line in readme.splitlines() if line.startswith(f"| {name} |")).strip("|").split("|")
        measured = model["by_numbers"]
        assert [cell.strip() for cell in cells[1:]] == [f"{measured[n]['pass_at_1']:.1%}" for n in sorted(measured)]


def test_readme_quotes_the_record_of_the_model_that_teaches_itself():
    weights = zoo.path("told").parent
    record = json.loads((weights / "told.json").read_text())
    readme = (weights.parent / "README.md").read_text()
    for row, key in (("the problem alone", "by_operands"), ("with the worked solution", "told_by_operands")):
        cells = [cell.strip() for cell in next(line for line in readme.splitlines() if row in line).split("|")[2:-1]]
        measured = record["models"]["told"][key]
        assert cells == [f"{measured[n]['pass_at_1']:.1%}" for n in sorted(measured)]


def test_the_model_that_teaches_itself_makes_use_of_a_solution_and_needs_it():
    model, tokenizer = zoo.load("told")
    rows = zoo.problems(100, seed=5, split="test")
    told = [zoo_train._told_row(zoo_train.PAIRS["told"].task, row) for row in rows]
    plain, helped = (zoo_train.measure(model, tokenizer, CHAINS, given, seed=0)["pass_at_1"] for given in (rows, told))
    assert plain < 0.3 and helped > 0.9  # 14% and 98% of 500; more than four standard errors of 100 away


def test_told_problems_are_answered_without_a_fault():
    told = zoo_train.PAIRS["told"]
    lessons = replace(told.models[0], told=1.0)
    tokenizer = zoo.load("told")[1]
    ids, labels = zoo_train.supervised_batch(tokenizer, random.Random(0), lessons, told.task, told.trained_sizes)
    for row, row_labels in zip(ids.tolist(), labels.tolist(), strict=True):
        prompt = tokenizer.decode(row[: row_labels.index(next(label for label in row_labels if label != -100))])
        written = tokenizer.decode([label for label in row_labels if label != -100]).removesuffix("<|endoftext|>")
        problem, _, solution = prompt.partition("user\n")[2].partition("<|im_end|>")[0].partition("\n\n")
        assert written == solution == told.task.solution(problem)


def test_short_training_run_writes_a_loadable_pair(tmp_path, monkeypatch, pair):
    chains = zoo_train.PAIRS["chains"]
    shorter = tuple(replace(recipe, steps=5, batch_size=8) for recipe in chains.models)
    monkeypatch.setitem(zoo_train.PAIRS, "chains", replace(chains, models=shorter))
    monkeypatch.setattr(zoo_train, "MAX_NEW_TOKENS", 8)
    zoo_train.main(["--out", str(tmp_path), "--eval-problems", "4", "--seed", "3"])
    monkeypatch.setattr(zoo, "path", lambda name: tmp_path / name)
    for name in zoo.NAMES:
        model, tokenizer = zoo.load(name)
        assert tokenizer.get_vocab() == pair[name][1].get_vocab()
        assert model.config.vocab_size == pair[name][0].config.vocab_size
        assert model.num_parameters() == pair[name][0].num_parameters()
    record = json.loads((tmp_path / "training.json").read_text())
    assert [record["models"][name]["recipe"]["steps"] for name in zoo.NAMES] == [5, 5]


def test_training_is_deterministic_and_lowers_the_loss():
    chains = zoo_train.PAIRS["chains"]
    recipe = replace(chains.models[0], batch_size=16)
    tokenizer = zoo.load("student")[1]
    losses = [[loss for _, loss in zoo_train.train(recipe, chains, tokenizer, steps=30, seed=4)] for _ in range(2)]
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.7 * losses[0][0]


def test_only_completions_are_labelled_and_the_stop_token_is():
    tokenizer = zoo.load("student")[1]
    pair = zoo_train.PAIRS["chains"]
    ids, labels = zoo_train.supervised_batch(tokenizer, random.Random(0), pair.models[0], pair.task, pair.trained_sizes)
    for row, row_labels in zip(ids.tolist(), labels.tolist(), strict=True):
        kept = [label for label in row_labels if label != -100]
        assert kept.count(tokenizer.eos_token_id) == 1  # although it is also the padding
        assert kept[-1] == tokenizer.eos_token_id
        start = row_labels.index(kept[0])
        assert tokenizer.decode(row[:start]).endswith("<|im_start|>assistant\n")
        assert row[start : start + len(kept)] == kept


def test_nonsensical_options_are_refused(capsys):
    for option, value in (("--steps-scale", "0"), ("--eval-problems", "0"), ("--threads", "0")):
        with pytest.raises(SystemExit):
            zoo_train.main(["--out", "unused", option, value])
        assert option in capsys.readouterr().err


# ---- the second task ----

CLOCK = zoo.TASKS["clock"]
NUMBERS = {
    word: value
    for value, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
}


def last_digit(problem: str) -> str:
    """The answer by Python's own arithmetic, parentheses added so that it reads from left to right."""
    signs = {"plus": "+", "minus": "-", "times": "*"}
    words = [str(NUMBERS.get(word, signs.get(word))) for word in problem.split(" ")]
    value = eval(
        "(" * (len(words) // 2) + words[0] + "".join(f"{a}{b})" for a, b in zip(words[1::2], words[2::2], strict=True))
    )
    return next(word for word, number in NUMBERS.items() if number == value % 10)


def test_clock_problems_are_right_distinct_and_split():
    rows = CLOCK.problems(400, seed=1, split="test", size=6)
    texts = [row["prompt"][0]["content"] for row in rows]
    assert len(set(texts)) == 400
    assert all(re.fullmatch(r"[a-z]+( (plus|minus|times) [a-z]+){5}", text) for text in texts)
    assert [row["answer"] for row in rows] == [last_digit(text) for text in texts]
    assert not set(texts) & {row["prompt"][0]["content"] for row in CLOCK.problems(400, seed=1, size=6)}


def test_a_clock_problem_is_solved_step_by_step():
    solved = "three times four is two two minus five is seven \\boxed{seven}"
    assert CLOCK.solution("three times four minus five") == solved
    for i, row in enumerate(CLOCK.problems(100, seed=2, size=4)):
        text = CLOCK.corrupted_solution(row["prompt"][0]["content"], random.Random(i), wrong_step=1.0, drift=0.0)
        words, state = text.split(" "), row["prompt"][0]["content"].split(" ")[0]
        for at in range(0, 15, 5):
            first, sign, second, _, result = words[at : at + 5]
            assert first == state and result != last_digit(f"{first} {sign} {second}") and result in NUMBERS
            state = result
        assert words[-1] == f"\\boxed{{{state}}}"


def test_word_pieces_are_words_of_the_task_and_lose_nothing():
    tokenizer = word_piece_tokenizer(CLOCK, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    again = word_piece_tokenizer(CLOCK, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    assert tokenizer.get_vocab() == again.get_vocab()
    assert len(tokenizer) <= min(recipe.head_rows for recipe in zoo_train.PAIRS["clock"].models)
    for row in CLOCK.problems(50, seed=3, size=5):
        problem = row["prompt"][0]["content"]
        for text in (problem, CLOCK.corrupted_solution(problem, random.Random(0), wrong_step=0.2, drift=0.3)):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert tokenizer.unk_token_id not in ids
            assert len(ids) < 0.5 * len(text)  # pieces, not characters
    assert tokenizer.tokenize("\\boxed{ab}")[0] == "\\boxed{"


@pytest.mark.parametrize("name", ["long-chains", "clock", "programs", "dialogue"])
def test_pairs_of_the_study_train_and_load(name, tmp_path, monkeypatch):
    pair = zoo_train.PAIRS[name]
    shorter = tuple(replace(recipe, steps=2, batch_size=4) for recipe in pair.models)
    monkeypatch.setitem(zoo_train.PAIRS, name, replace(pair, models=shorter, measured_sizes=(3,)))
    monkeypatch.setattr(zoo_train, "MAX_NEW_TOKENS", 4)
    command = ["--pair", name, "--out", str(tmp_path), "--eval-problems", "3"]
    zoo_train.main(command)
    monkeypatch.setattr(zoo, "path", lambda name: tmp_path / name)
    for role, recipe in zip(zoo.NAMES, pair.models, strict=True):
        model, tokenizer = zoo.load(role)
        assert model.config.model_type == recipe.family
        assert tokenizer.eos_token == recipe.eos_token and len(tokenizer) <= recipe.head_rows
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    record = json.loads((tmp_path / "training.json").read_text())
    zoo_train.main([*command, "--keep"])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert json.loads((tmp_path / "training.json").read_text())["models"] == record["models"]
    # Another student is another pair: it alone is trained again.
    changed = (replace(shorter[0], drift=0.3), shorter[1])
    monkeypatch.setitem(zoo_train.PAIRS, name, replace(pair, models=changed, measured_sizes=(3,)))
    zoo_train.main([*command, "--keep"])
    assert {path.parent.name for path in before if path.stat().st_mtime_ns != before[path]} == {"student"}


def test_task_sizes_are_part_of_a_data_spec():
    from trb.tasks.prompts import load_prompts

    rows = load_prompts("zoo:clock?operands=3", split="test", limit=5, seed=4)
    assert [row["prompt"] for row in rows] == [r["prompt"] for r in CLOCK.problems(5, seed=4, split="test", size=3)]
    for spec, message in (
        ("zoo:chains?moves=3", "no setting 'moves'"),
        ("zoo:clock?operands=many", "operands is 'many'"),
        ("zoo:riddles", "zoo:chains, zoo:clock"),
        ("zoo:chains?operands=1", "operands=1"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            load_prompts(spec)


def test_an_unknown_model_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown zoo model 'studnet'; choose one of .*; did you mean 'student'\?"):
        zoo.path("studnet")
