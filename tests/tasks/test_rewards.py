"""Grading: right answers are right, wrong ones wrong, and no answer can hang, kill or exhaust the run."""

import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import psutil
import pytest

from trb.errors import InputError
from trb.tasks.answers import encode_metadata
from trb.tasks.grading import VERIFIERS, Verifier, _prepare
from trb.tasks.prompts import load_prompts

TOWER = r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(timeout_s=30.0) as shared:
        yield shared


def workers() -> set[psutil.Process]:
    """Those of every verifier of this process."""
    return {child for child in psutil.Process().children() if "trb.tasks.grading" in " ".join(child.cmdline())}


def math_rows(*answers: str) -> list[dict[str, str]]:
    return [{"answer": answer, "verifier": "math"} for answer in answers]


# --- what counts as right: see also test_graded_pairs.py -------------------------------------------------


def spellings(rng: random.Random, value: Fraction) -> str:
    top, bottom = value.numerator, value.denominator
    factor = rng.choice([1, 2, 3, 7])
    a, b = top * factor, bottom * factor
    forms = [f"{a}/{b}", f"\\frac{{{a}}}{{{b}}}", f"\\dfrac{{{-a}}}{{{-b}}}", f"-\\frac{{{-a}}}{{{b}}}"]
    if 1000 % bottom == 0:
        forms += [f"{float(value)}", f"{float(value):.4f}"]
    if bottom == 1:
        forms += [f"{top:,}", f"{top}.0", f"{top}^1"]
    return rng.choice(forms)


def test_random_rationals_against_exact_arithmetic(verifier: Verifier) -> None:
    rng = random.Random(7)
    pairs = []
    for _ in range(150):
        value = Fraction(rng.randint(-4000, 4000), rng.choice([1, 1, 2, 5, 8, 9, 100]))
        other = value if rng.random() < 0.5 else value + Fraction(rng.randint(-9, 9), rng.choice([1, 3, 10]))
        pairs.append((value, other))
    completions = [f"\\boxed{{{spellings(rng, other)}}}" for _, other in pairs]
    rows = math_rows(*(spellings(rng, value) for value, _ in pairs))
    scores = verifier.score(completions, rows)
    for (value, other), completion, row, score in zip(pairs, completions, rows, scores, strict=True):
        assert score == float(value == other), (row["answer"], completion)


def test_exact_compares_text_and_needs_no_worker() -> None:
    rows = [{"answer": "a  b", "verifier": "exact"}] * 5
    completions = ["\\boxed{ a b }", "\\boxed{a\nb}", "\\boxed{ab}", "a b", "\\boxed{a b} \\boxed{c}"]
    before = workers()
    with Verifier() as verifier:
        assert verifier.score(completions, rows) == [1.0, 1.0, 0.0, 0.0, 0.0]
        assert verifier.score([r"\boxed{0.5}"], [{"answer": "1/2", "verifier": "exact"}]) == [0.0]
        unfinished = [
            r"\boxed{a b} \boxed{a",
            r"<think>\boxed{a b}</think> so",
            r"<think>\boxed{c}</think> \boxed{a b}",
        ]
        assert verifier.score(unfinished, rows[:3]) == [0.0, 0.0, 1.0]
        assert workers() == before


def test_rows_without_an_answer_have_no_score(verifier: Verifier) -> None:
    first, second, third = verifier.score([r"\boxed{1}"] * 3, math_rows("", "1", "2"))
    assert math.isnan(first) and (second, third) == (1.0, 0.0)
    assert verifier.score([], []) == []


def test_bad_arguments(verifier: Verifier) -> None:
    with pytest.raises(ValueError, match="2 completions for 1 rows"):
        verifier.score(["a", "b"], math_rows("1"))
    with pytest.raises(ValueError, match="unknown verifier 'maths'"):
        verifier.score(["a"], [{"answer": "1", "verifier": "maths"}])
    with pytest.raises(ValueError, match="unknown verifier 'math:x'"):
        verifier.score(["a"], [{"answer": "1", "verifier": "math:x"}])


def test_a_verifier_from_outside_may_ask_the_worker(verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    def brief(completion: str, row: Mapping[str, Any]) -> Any:
        return VERIFIERS["math"](completion, row) if len(completion) < 40 else 0

    monkeypatch.setitem(VERIFIERS, "brief", brief)
    rows = [{"answer": "1/2", "verifier": "brief"}] * 3
    completions = [r"\boxed{0.5}", r"\boxed{0.6}", "so " * 20 + r"\boxed{0.5}"]
    assert verifier.score(completions, rows) == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="timeout_s is 0"):
        Verifier(timeout_s=0)


def test_references_behind_four_marks(tmp_path: Path, verifier: Verifier) -> None:
    """By way of a file, as they come: a comma is kept, be it of a list or between digits."""
    cases = [
        ("#### 1,234", "1234", 1.0),
        ("#### 1,234", "1,234", 1.0),
        ("#### 1,234", "234", 0.0),
        ("#### $1,234.50", "1234.5", 1.0),
        ("#### 2,3", "2, 3", 1.0),
        ("#### 2,3", "23", 0.0),
        (r"#### \{1,2,3\}", r"\{3,2,1\}", 1.0),
        (r"#### \{1,2,3\}", r"\{123\}", 0.0),
        ("#### Final Answer\n\\boxed{(1, 2)}", "(1, 2)", 1.0),
    ]
    path = tmp_path / "solutions.jsonl"
    path.write_text("".join(json.dumps({"prompt": "?", "solution": solution}) + "\n" for solution, _, _ in cases))
    completions = [f"\\boxed{{{answer}}}" for _, answer, _ in cases]
    assert verifier.score(completions, load_prompts(path).to_list()) == [score for _, _, score in cases]


# --- reasoning-gym ---------------------------------------------------------------------------------------

# rearc compares grids of tuples; countdown accepts any expression with the right value; the others are plain.
TASKS = ["chain_sum", "countdown", "rearc", "word_sorting", "knights_knaves", "mini_sudoku", "propositional_logic"]


@pytest.mark.parametrize("task", TASKS)
def test_reasoning_gym_scores_like_its_own_dataset(verifier: Verifier, task: str) -> None:
    pytest.importorskip("reasoning_gym")
    rows = load_prompts(f"reasoning-gym:{task}", limit=3).to_list()
    if task == "propositional_logic":  # has no reference answer; any valid conclusion counts
        completions = ["<answer>nonsense</answer>"] * 3
        assert verifier.score(completions, rows) == [0.0] * 3
        return
    right = [f"<answer>0</answer> no:\n<answer>\n{row['answer']}\n</answer>" for row in rows]
    assert verifier.score(right, rows) == [1.0] * 3
    assert verifier.score([f"\\boxed{{{row['answer']}}}" for row in rows[:1]], rows[:1]) == [1.0]
    unmarked = f"It is {rows[1]['answer']}."
    assert verifier.score(["<answer>wrong</answer>", unmarked, ""], rows) == [0.0] * 3


def test_reasoning_gym_the_last_mark_counts_and_partial_credit_does_not(verifier: Verifier) -> None:
    pytest.importorskip("reasoning_gym")
    row = load_prompts("reasoning-gym:chain_sum?min_terms=3&max_terms=3", limit=1).to_list()[0]
    good = row["answer"]
    cases = {
        f"\\boxed{{1.5}} <answer>{good}</answer>": 1.0,
        f"<answer>{good}</answer> \\boxed{{1.5}}": 0.0,
        f"\\boxed{{\\text{{{good}}}}}": 1.0,
        f"<answer>{good} or something else</answer>": 0.0,  # the task itself gives this a part of a point
        "</answer><answer>": 0.0,
        f"<answer>{good}</answer> no: <answer>1": 0.0,  # cut short
        f"<answer>{good}</answer> no: \\boxed{{1": 0.0,
        f"<think><answer>{good}</answer></think> I do not know": 0.0,
        f"<think><answer>1</answer></think> <answer>{good}</answer>": 1.0,
        f"<answer>{'9' * 10**6}</answer>": 0.0,
    }
    assert verifier.score(list(cases), [row] * len(cases)) == list(cases.values())


def test_reasoning_gym_unusable_metadata_is_an_error(verifier: Verifier) -> None:
    pytest.importorskip("reasoning_gym")
    row = {"answer": "1", "verifier": "reasoning-gym:chain_sum", "metadata": "{}"}
    with pytest.raises(ValueError, match=r"reasoning-gym:chain_sum.*unusable metadata"):
        verifier.score([r"\boxed{1}", r"\boxed{2}"], [row, row])
    assert verifier.score([r"\boxed{x+1}"], math_rows("1+x")) == [1.0]  # no stale reply is read


@pytest.mark.parametrize(("task", "nonsense"), [("game_of_life_halting", "zzzz"), ("complex_arithmetic", "nan")])
def test_reasoning_gym_scorers_that_are_content_with_anything_are_refused(
    verifier: Verifier, task: str, nonsense: str
) -> None:
    """Of rows in a file too, which `load_prompts` did not make."""
    gym = pytest.importorskip("reasoning_gym")
    entry = gym.create_dataset(task, seed=1, size=1)[0]
    metadata = encode_metadata({"task": task, "settings": {}, "entry": entry})
    row = {"answer": entry["answer"], "verifier": f"reasoning-gym:{task}", "metadata": metadata}
    for _ in range(2):
        with pytest.raises(ValueError, match=f"scorer of '{task}' gives full marks to the answer '{nonsense}'"):
            verifier.score([f"<answer>{nonsense}</answer>"], [row])


# --- hostile answers -------------------------------------------------------------------------------------


def test_hostile_answers_neither_hang_nor_shift_the_others() -> None:
    hostile = [
        TOWER,
        r"\boxed{(10^{9})!}",
        "\\boxed{" + "9" * 10**6 + "}",
        "\\boxed{" + "1+" * 500_000 + "1}",
        "\\boxed{" * 100_000,
        "\\boxed{" * 50_000 + "}" * 50_000,
        "x" * 10**6,
        "the answer is " * 70_000,
    ]
    completions, rows, expected = [], [], []
    for index, text in enumerate(hostile):
        completions += [f"\\boxed{{{index}+x}}", text]
        rows += math_rows(f"x+{index}", "5")
        expected += [1.0, 0.0]
    started = time.monotonic()
    with Verifier(timeout_s=1.0) as verifier:
        assert verifier.score(completions, rows) == expected
        assert 2 <= verifier.timeouts <= len(hostile)
        assert verifier.crashes == 0
    assert time.monotonic() - started < 55


NASTY = {
    "exponent": r"\boxed{10^{10^{10}}}",
    "small exponent": r"\boxed{10^{-10^{10}}}",
    "exponent of a decimal": r"\boxed{1.5e999999999}",
    "exponent in code": "\\boxed{10**10**10}",
    "announced tower": "The answer is $9^{9^{9^{9}}}$.",
    "tower after four marks": "#### 9^9^9^9",
    "nearly equal towers": r"\boxed{9^{9^{9}}+5-9^{9^{9}}+1}",
    "brackets in code": "\\boxed{" + "sqrt(" * 300 + "1" + ")" * 300 + "}",
    "digits": "\\boxed{0." + "3" * 1900 + "}",
    "many digits": "\\boxed{0." + "3" * 10**6 + "}",
    "repeated digits": "\\boxed{0.\\overline{" + "3" * 1900 + "}}",
    "digits of a base": "\\boxed{" + "1" * 1900 + "_{36}}",
    "digits in base ten": "\\boxed{" + "1" * 10**6 + "_{10}}",
    "bare boxes": "\\boxed\\a{" * 50_000,
    "cut boxes": "\\boxed " * 50_000,
    "thoughts": "<think></think>" * 50_000 + "so",
    "announcements": "answer:*. " * 50_000 + " " * 50_000,
    "dollars": "the answer is $" + "\\$" * 100_000,
    "emphasis": "the answer is **" + " a" * 100_000,
    "words": "\\boxed{" + "a" * 10**6 + "1}",
    "variables": "\\boxed{(" + "+".join(f"x_{{{i}}}" for i in range(60)) + ")^{40}}",
}


@pytest.mark.parametrize("gold", ["5", "10_{10}", "0.333333", "x+5", r"\text{yes}"])
def test_reading_a_completion_takes_linear_time(gold: str) -> None:
    for name, text in NASTY.items():
        started = time.process_time()
        _prepare(text, {"answer": gold})
        assert time.process_time() - started < 2, name


def test_nasty_numbers_neither_hang_nor_score() -> None:
    rows = math_rows(*(["5"] * len(NASTY)))
    with Verifier(timeout_s=1.0) as verifier:
        assert verifier.score([*NASTY.values(), r"\boxed{x+1}"], [*rows, *math_rows("1+x")]) == [0.0] * len(NASTY) + [
            1.0
        ]
        assert verifier.timeouts < len(NASTY) / 2 and verifier.crashes == 0


# A math-verify that crashes, in front of the real one: the worker looks for modules where this process does.
TRAPS = """
import os, sys
place = sys.path.pop(0)
del sys.modules["math_verify"]
import math_verify
sys.path.insert(0, place)
parse = math_verify.parse
def trapped(text, *arguments, **options):
    if "die" in text: os._exit(7)
    if "allocate" in text: bytearray(3 * 2**30); text = r"\\boxed{1}"  # right, if there is so much
    print("noise on stdout")
    return parse(text, *arguments, **options)
math_verify.parse = trapped
"""


@pytest.fixture
def traps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "math_verify.py").write_text(TRAPS)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("traps")
def test_a_crash_costs_only_the_answer_that_caused_it() -> None:
    answers = ["x+1", "die", "x+2", "die", "die", "x+3"]
    with Verifier(timeout_s=30) as verifier:
        scores = verifier.score([f"\\boxed{{{a}}}" for a in answers], math_rows("1+x", "1", "2+x", "1", "1", "3+x"))
        assert scores == [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
        assert (verifier.crashes, verifier.timeouts) == (3, 0)


@pytest.mark.usefixtures("traps")
def test_memory_is_limited() -> None:
    pytest.importorskip("resource")
    with Verifier(timeout_s=30, memory_limit_mb=1024) as verifier:
        assert verifier.score([r"\boxed{allocate}", r"\boxed{x+1}"], math_rows("1", "1+x")) == [0.0, 1.0]
    with Verifier(timeout_s=300, memory_limit_mb=8192) as verifier:  # which has gigabytes to write
        assert verifier.score([r"\boxed{allocate}"], math_rows("1")) == [1.0]


def test_a_worker_that_died_between_calls_is_replaced(verifier: Verifier) -> None:
    assert verifier.score([r"\boxed{x+1}"], math_rows("1+x")) == [1.0]
    (worker,) = workers()
    worker.kill()
    worker.wait()
    assert verifier.score([r"\boxed{x+1}"], math_rows("1+x")) == [1.0]
    assert verifier.crashes == 0


def test_closing_ends_the_worker_and_use_after_closing_starts_another() -> None:
    verifier, before = Verifier(), workers()
    assert verifier.score([r"\boxed{x+1}"], math_rows("1+x")) == [1.0]
    (first,) = workers() - before
    verifier.close()
    verifier.close()
    assert not first.is_running()
    assert verifier.score([r"\boxed{x+1}"], math_rows("1+x")) == [1.0]
    (second,) = workers() - before
    del verifier
    assert not second.is_running()


def test_a_worker_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "math_verify.py").write_text("raise SystemExit('no sympy today')")
    monkeypatch.syspath_prepend(tmp_path)
    with Verifier() as verifier, pytest.raises(RuntimeError, match="did not start: no sympy today"):
        verifier.score([r"\boxed{x+1}"], math_rows("1"))


SCRIPT = """
import sys
import psutil
from trb.tasks.grading import Verifier
assert not {"torch", "datasets", "transformers"} & set(sys.modules), "heavy import"
verifier = Verifier(timeout_s=%s)
verifier.score([r"\\boxed{x+1}"], [{"answer": "1+x"}])
print(psutil.Process().children()[0].pid, flush=True)
print(verifier.score([%r], [{"answer": "5"}]), flush=True)
"""


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_script_without_main_guard_and_without_close_leaves_nothing_behind() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT % (20, r"\boxed{6}")], capture_output=True, text=True, check=True, timeout=100
    )
    pid, scores = done.stdout.split("\n")[:2]
    assert scores == "[0.0]" and done.stderr == ""
    assert gone(int(pid))


def test_a_killed_caller_does_not_leave_a_busy_worker() -> None:
    with subprocess.Popen([sys.executable, "-c", SCRIPT % (1, TOWER)], stdout=subprocess.PIPE, text=True) as caller:
        pid = int(caller.stdout.readline())
        idle = psutil.Process(pid).cpu_times().user

        def busy(pid: int) -> bool:
            return gone(pid) or psutil.Process(pid).cpu_times().user > idle + 0.05

        deadline = time.monotonic() + 20
        while not busy(pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        caller.kill()
    deadline = time.monotonic() + 20
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert gone(pid)


# --- rows and verifiers of one's own ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["math", "exact"])
def test_a_row_without_an_answer_has_no_score_and_a_number_is_an_answer(verifier: Verifier, name: str) -> None:
    rows: list[dict[str, Any]] = [{}, {"answer": None}, {"answer": 8}, {"answer": 8.0}, {"answer": 0}]
    scores = verifier.score([r"\boxed{8}"] * 4 + [r"\boxed{0}"], [{"verifier": name, **row} for row in rows])
    assert [math.isnan(score) for score in scores[:2]] == [True, True]
    assert verifier.score([r"\boxed{8}"], [{"answer": 8, "verifier": None}]) == [1.0]
    assert scores[2:] == [1.0, 1.0, 1.0]


async def later(completion: str, row: Mapping[str, Any]) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("given", "shown"),
    [(lambda *_: "yes", "'yes'"), (lambda *_: None, "None"), (lambda *_: 0.5, "0.5"), (later, "<cor")],
)
def test_a_verifier_that_gives_no_score_is_named_with_the_row(
    verifier: Verifier, monkeypatch: pytest.MonkeyPatch, given: Any, shown: str
) -> None:
    monkeypatch.setitem(VERIFIERS, "mine", given)
    rows = [{"answer": "1"}, {"answer": "1", "verifier": "mine"}]
    with pytest.raises(InputError, match=f"verifier 'mine' gave {shown}.* for row 1; it must give 1.0, 0.0 or nan"):
        verifier.score([r"\boxed{1}"] * 2, rows)
    monkeypatch.setitem(VERIFIERS, "mine", lambda *_: True)
    assert verifier.score([r"\boxed{1}"] * 2, rows) == [1.0, 1.0]
