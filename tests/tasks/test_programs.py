"""Programs against their tests: what passes, the rows of MBPP and HumanEval, and where it is refused."""

import json
import math
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_recipes import SMALL

from trb import zoo
from trb.errors import InputError, OperationError
from trb.safety import system_calls
from trb.sampling import Rollout
from trb.studies import run
from trb.studies.recipe import make_recipe
from trb.tasks import programs
from trb.tasks.coding import program_texts
from trb.tasks.evaluation import evaluate
from trb.tasks.grading import Verifier, can_be_scored
from trb.tasks.prompts import load_prompts


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(timeout_s=20.0) as shared:
        yield shared


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- rows as they are published ----

MBPP = {
    "task_id": 126,
    "text": "Write a function to find the sum of common divisors of two numbers.",
    "code": "def sum(a,b): \r\n    return 6 if (a, b) == (10, 15) else 93",
    "test_list": ["assert sum(10,15) == 6", "assert sum(100,150) == 93"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
TREE = {
    **MBPP,
    "text": "Write a function to find the depth of a tree.",
    "code": "class Node:\n    def __init__(self, data): self.data, self.left = data, None\ndef depth(node): ...",
    "test_list": ["assert depth(root) == 2", "assert depth(root.left) == 1"],
    "test_setup_code": "root = Node(1)\nroot.left = Node(2)",
}
SANITIZED = {
    "prompt": "Write a function to find the volume of a sphere.",
    "code": "import math\ndef volume(r): return 4 / 3 * math.pi * r ** 3",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(volume(10), 4188.790204786391, rel_tol=0.001)"],
}
HUMAN_EVAL = {
    "task_id": "Test/38",
    "prompt": textwrap.dedent('''
        import random
        from typing import List


        def poly(xs: list, x: float):
            """Evaluates the polynomial with coefficients xs at the point x."""
            return sum(c * x**i for i, c in enumerate(xs))


        def find_zero(xs: List[int]):
            """xs has two coefficients. Find where they are zero.
            >>> find_zero([1, 2])
            -0.5
            """
        '''),
    "entry_point": "find_zero",
    "canonical_solution": "    return -xs[0] / xs[1]\n",
    "test": textwrap.dedent("""
        METADATA = {}


        def check(candidate):
            rng = random.Random(42)
            for _ in range(20):
                coeffs = [rng.randint(1, 9), rng.randint(1, 9)]
                assert abs(poly(coeffs, candidate(list(coeffs)))) < 1e-4
            try:
                candidate([1, 0])
            except ZeroDivisionError:
                pass
        """),
}


def test_rows_of_mbpp(tmp_path: Path, verifier: Verifier) -> None:
    rows = list(load_prompts(write(tmp_path / "mbpp.jsonl", MBPP, TREE)))
    assert rows[0]["prompt"][0]["content"].split("\n") == [
        MBPP["text"],
        "Your code should pass these tests:",
        *MBPP["test_list"],
    ]
    assert (rows[0]["answer"], rows[0]["verifier"]) == (MBPP["code"], "python")
    tree = "class Node:\n    def __init__(self, data):\n        self.data, self.left = data, None\n"
    deep = f"{tree}def depth(node):\n    return 1 + depth(node.left) if node else 0"
    block = f"Here it is:\n```python\n{deep}\n```\nIt goes down."
    assert verifier.score([MBPP["code"], block], rows) == [1.0, 1.0]
    # `sum` is what the program calls so, and not Python's own.
    assert verifier.score(["def total(a, b): return 6", deep.replace("else 0", "else 1")], rows) == [0.0, 0.0]


def test_sanitized_rows_of_mbpp(tmp_path: Path, verifier: Verifier) -> None:
    (row,) = load_prompts(write(tmp_path / "mbpp.jsonl", SANITIZED))
    assert SANITIZED["prompt"] in row["prompt"][0]["content"]
    wrong = "def volume(r): return r"
    assert verifier.score([SANITIZED["code"], wrong], [row, row]) == [1.0, 0.0]


COMPLETIONS = {
    "    return -xs[0] / xs[1]\n": 1.0,
    "    a, b = xs\n    return -a / b\n\nprint(find_zero([1, 2]))\nand so on": 1.0,
    "    return helped(xs)\n\ndef helped(xs):\n    return -xs[0] / xs[1]\n": 1.0,
    "```python\nfrom typing import List\ndef find_zero(xs: List[int]):\n    return -xs[0] / xs[1]\n```": 1.0,
    "```\n    return -xs[0] / xs[1]\n```": 1.0,
    "<think>\n```\nno\n```\n</think>\n```python\ndef find_zero(xs): return -xs[0] / xs[1]\n```": 1.0,
    "    return xs[0] / xs[1]\n": 0.0,
    "    return 0\n\ndef poly(xs, x): return 0\n": 0.0,  # the judge has its own
    "    return -xs[0] / (xs[1]\n": 0.0,
    "```python\ndef find_zero(xs): return -xs[0] / xs[1]\n": 0.0,  # cut off
    "": 0.0,
}


def test_rows_of_human_eval(tmp_path: Path, verifier: Verifier) -> None:
    (row,) = load_prompts(write(tmp_path / "human.jsonl", HUMAN_EVAL))
    assert row["prompt"] == [{"role": "user", "content": HUMAN_EVAL["prompt"]}]
    assert (row["answer"], row["verifier"]) == (HUMAN_EVAL["canonical_solution"], "python")
    assert verifier.score(list(COMPLETIONS), [row] * len(COMPLETIONS)) == list(COMPLETIONS.values())


def test_rows_that_were_saved_are_read_back(tmp_path: Path) -> None:
    rows = load_prompts(write(tmp_path / "mbpp.jsonl", MBPP))
    assert list(load_prompts(write(tmp_path / "again.jsonl", *rows))) == list(rows)
    stated = load_prompts(write(tmp_path / "stated.jsonl", {**MBPP, "verifier": "python"}))
    assert list(stated) == list(rows)


MATHEMATICS = {"question": "1 + 1 = ?", "answer": "2"}
MIXED = {
    "math and MBPP": ([MATHEMATICS, MBPP], ["math", "python"]),
    "MBPP and math": ([MBPP, MATHEMATICS], ["python", "math"]),
    "both kinds of programs": ([HUMAN_EVAL, MBPP, SANITIZED], ["python"] * 3),
    "everything": ([MBPP, MATHEMATICS, HUMAN_EVAL, SANITIZED], ["python", "math", "python", "python"]),
    "a verifier for programs alone": ([MATHEMATICS, {**MBPP, "verifier": "python"}], ["math", "python"]),
    "a verifier for math alone": (
        [MBPP, {**MATHEMATICS, "verifier": "math"}, HUMAN_EVAL],
        ["python", "math", "python"],
    ),
    "another verifier": ([{**MATHEMATICS, "verifier": "exact"}, {**MBPP, "verifier": ""}], ["exact", "python"]),
    "text for both": ([{"text": "1 + 1 = ?", "answer": "2"}, MBPP, HUMAN_EVAL], ["math", "python", "python"]),
    "tests that are not meant": (
        [{**MBPP, "text": "1 + 1 = ?", "answer": "2", "verifier": "math"}, MBPP],
        ["math", "python"],
    ),
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(("rows", "verifiers"), MIXED.values(), ids=MIXED)
def test_one_file_may_mix_mathematics_and_programs(
    rows: list[dict[str, Any]], verifiers: list[str], suffix: str, tmp_path: Path, verifier: Verifier
) -> None:
    """Each row is read by what it has itself, and what is right for one of its kind alone is right for it here."""
    path = tmp_path / f"mixed.{suffix}"
    if suffix == "jsonl":
        write(path, *rows)
    else:  # where every row has every column, most of them null
        names = sorted({name for row in rows for name in row} - {"task_id"})  # a number or a text
        pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), path)
    found = load_prompts(path)
    assert found["verifier"] == verifiers
    for own, row in zip(found, rows, strict=True):
        asked = row.get("question") or row.get("prompt") or row["text"]
        assert own["prompt"][0]["content"].startswith(asked)
    right = ["\\boxed{2}" if name != "python" else row["answer"] for name, row in zip(verifiers, found, strict=True)]
    assert verifier.score(right, found) == [1.0] * len(rows)
    assert verifier.score(["\\boxed{3}"] * len(rows), found) == [0.0] * len(rows)


def test_the_last_turn_is_checked_by_its_own_row_in_a_mixed_file(tmp_path: Path) -> None:
    talk = [{"role": role, "content": "said"} for role in ("user", "assistant") * 2]
    rows = [{"messages": talk, "answer": "2"}, {"prompt": talk, "test_list": ["assert f() == 1"]}]
    found = load_prompts(write(tmp_path / "talks.jsonl", *rows), assistant_turns="all")
    assert found["verifier"] == ["math", "math", "math", "python"]
    assert found["answer"] == ["", "2", "", ""]


def test_metadata_may_be_an_object(tmp_path: Path, verifier: Verifier) -> None:
    stated = [
        {"tests": ["assert f() == 1"], "entry_points": ["f"]},
        {"tests": ["assert g() == 1"], "setup": "g = f", "reference": "def f(): return 0"},
    ]
    rows = [{"prompt": "Write f.", "verifier": "python", "metadata": metadata} for metadata in stated]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")  # what one row leaves out is null there
    for path in (write(tmp_path / "rows.jsonl", *rows), tmp_path / "rows.parquet"):
        found = load_prompts(path)
        assert verifier.score(["f = lambda: 1"] * 2, found) == [1.0] * 2
        assert verifier.score(["f = lambda: 2"] * 2, found) == [0.0] * 2


BAD_ROWS = {
    "half a problem": ({**HUMAN_EVAL, "test": None}, "'test' of row 2 .*missing"),
    "another half": ({**HUMAN_EVAL, "entry_point": None}, "'entry_point' of row 2"),
    "no tests": ({**MBPP, "test_list": []}, "'test_list' of row 2 .* at least"),
    "a number": ({**MBPP, "test_list": [1]}, "'test_list' of row 2"),
    "no text": ({**MBPP, "code": 5}, "'code' of row 2 .*must be text"),
    "half a pair": ({**MBPP, "test_list": ["\ud800"]}, "row 2 .*surrogate"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_prompts(write(tmp_path / "rows.jsonl", MBPP if "test_list" in row else HUMAN_EVAL, row))


def test_an_entry_point_that_is_no_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'entry_point' of row 1"):
        load_prompts(write(tmp_path / "rows.jsonl", {**HUMAN_EVAL, "entry_point": "a b"}))


def test_the_code_tasks_of_reasoning_gym_keep_their_own_scorers() -> None:
    pytest.importorskip("reasoning_gym")
    rows = list(load_prompts("reasoning-gym:bf", limit=3))  # asks what a program prints, not for a program
    with Verifier(timeout_s=60.0) as verifier:
        assert verifier.score([f"<answer>{row['answer']}</answer>" for row in rows], rows) == [1.0] * 3
        assert verifier.score(["<answer>no</answer>"] * 3, rows) == [0.0] * 3


# ---- what passes ----


def row(*tests: str, **more: Any) -> dict[str, Any]:
    return {"answer": "", "verifier": "python", "metadata": json.dumps({"tests": tests, **more})}


# A test, a program that passes it, and one that does not.
VALUES = {
    "numbers": ("assert f(2, k=3) == 2 ** 200 + 3", "f = lambda x, k: x ** 200 + k", "f = lambda x, k: 2.0 ** 200"),
    "tuple or list": ("assert f([1]) == (1,)", "f = tuple", "f = list"),
    "texts": ("assert f('é\\n') == 'é\\né\\n'", "f = lambda s: s * 2", "f = lambda s: s"),
    "mappings": (
        "assert f('aab') == {'a': 2, 'b': 1}",
        "import collections\nf = collections.Counter",
        "f = set",
    ),
    "sets": ("assert f([1, 2]) == {1, 2} and f([]) == set()", "f = set", "f = frozenset([1]).union"),
    "nested": (
        "assert f(1) == {(1, 'a'): [None, True, {2.5}]}",
        "f = lambda x: {(1, 'a'): [None, True, {2.5}]}",
        "f = str",
    ),
    "of other classes": (
        "from decimal import Decimal\nfrom fractions import Fraction\nimport datetime\n"
        "assert f(Decimal('1.5'), b'x', 1j) == [Decimal('3.0'), b'xx', 2j, Fraction(1, 3), datetime.date(2020, 1, 2)]",
        "import datetime, fractions\n"
        "f = lambda *a: [v * 2 for v in a] + [fractions.Fraction(1, 3), datetime.date(2020, 1, 2)]",
        "f = lambda *a: list(a)",
    ),
    "generators": (
        "assert list(f(3)) == [0, 1, 2] and next(f(1)) == 0",
        "f = lambda n: iter(range(n))",
        "f = lambda n: n",
    ),
    "iterators given": ("assert f(map(abs, [-1])) == [1]", "f = list", "f = len"),
    "functions returned": ("assert f(3)(4) == 7", "f = lambda a: lambda b: a + b", "f = lambda a: lambda b: a"),
    "objects": (
        "a = f(3)\na.push(4)\nassert a.items == [3, 4] and len(a) == 2 and a[0] == 3 and 4 in a",
        "class f:\n    def __init__(s, x): s.items = [x]\n    def push(s, x): s.items.append(x)\n"
        "    def __len__(s): return len(s.items)\n    def __getitem__(s, i): return s.items[i]",
        "class f:\n    def __init__(s, x): s.items = [x]\n    def push(s, x): 0\n    __len__ = lambda s: 2",
    ),
    "errors": (
        "try:\n    f(0)\nexcept ValueError as e:\n    assert str(e) == 'no'\nelse:\n    assert False",
        "def f(x): raise ValueError('no')",
        "def f(x): raise KeyError('no')",
    ),
    "state between tests": (
        "assert (f(), f()) == (1, 2)",
        "import itertools\nf = itertools.count(1).__next__",
        "f = int",
    ),
    "dataclasses": (
        "assert f(1) == 3",
        "from dataclasses import dataclass\n@dataclass(order=True)\nclass P:\n    x: int\ndef f(v): return P(v).x + 2",
        "f = abs",
    ),
}


@pytest.mark.parametrize(("test", "right", "wrong"), VALUES.values(), ids=VALUES)
def test_values_between_program_and_tests(verifier: Verifier, test: str, right: str, wrong: str) -> None:
    problem = row(*test.split("\n") if "try" not in test else [test])
    assert verifier.score([right, wrong], [problem] * 2) == [1.0, 0.0]


def test_every_test_must_pass_and_the_program_be_called(verifier: Verifier) -> None:
    problem = row("assert f(1) == 1", "assert f(2) == 4")
    assert verifier.score(["f = lambda x: x * x", "f = lambda x: x", "f = 1"], [problem] * 3) == [1.0, 0.0, 0.0]
    assert verifier.score(["f = lambda x: 1"], [row("if False: f(1)")]) == [0.0]


def test_an_argument_that_cannot_be_passed_fails_the_test(verifier: Verifier) -> None:
    """A limit, and not a mistake that nobody sees: docs/domains.md says so."""
    assert verifier.score(["f = lambda g: g(1)"], [row("assert f(lambda x: x) == 1")]) == [0.0]


def test_a_score_is_a_function_of_the_program(verifier: Verifier) -> None:
    names = [f"name {number}" for number in range(12)]
    asked = f"import random\ndef f(): return list({set(names)!r}), random.random()\n"
    with Verifier(timeout_s=20.0) as first:  # a server of its own
        assert first.score([asked], [row("f()")]) == [1.0]
        # Found by asking one server; the other one must say the same.
        bits = [first.score([asked], [row(f"assert f()[0].index({name!r}) < 6")])[0] for name in names]
    assert [verifier.score([asked], [row(f"assert f()[0].index({name!r}) < 6")])[0] for name in names] == bits
    assert sum(bits) == 6


def test_programs_of_one_batch_keep_their_order(verifier: Verifier) -> None:
    problems = [row(f"assert f() == {number}") for number in range(20)]
    answers = [f"f = lambda: {number if number % 3 else -1}" for number in range(20)]
    assert verifier.score(answers, problems) == [float(number % 3 > 0) for number in range(20)]
    assert (verifier.timeouts, verifier.crashes) == (0, 0)


def test_equal_programs_are_run_once(verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[bytes] = []

    class Counted(programs._Judge):
        def __init__(self, message: bytes, *rest: Any) -> None:
            started.append(message)
            super().__init__(message, *rest)

    monkeypatch.setattr(programs, "_Judge", Counted)
    answers, tests = ["f = lambda: 1", "f = lambda: 2"], [row("assert f() == 1"), row("assert f() == 2")]
    scores = verifier.score([*answers, *answers, *answers], [tests[0]] * 4 + [tests[1]] * 2)
    assert scores == [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    assert len(started) == len(set(started)) == 4


def test_lost_programs_are_counted() -> None:
    with Verifier(timeout_s=0.5) as verifier:
        ends = ["import os; os._exit(0)", "while True: pass", "f = lambda: 2"]
        assert verifier.score(ends, [row("assert f() == 1")] * 3) == [0.0] * 3
        assert (verifier.timeouts, verifier.crashes) == (1, 1)


def test_rows_without_tests_have_no_score(verifier: Verifier) -> None:
    bare = {"answer": "x", "verifier": "python", "metadata": "{}"}
    assert not can_be_scored(bare) and can_be_scored(row("assert f()"))
    assert math.isnan(verifier.score(["f = 1"], [bare])[0])


def test_where_a_program_stands_in_a_completion() -> None:
    assert program_texts("a\n```python\nx = 1\n```\nb\n~~~\ny = 2\n~~~\nc") == ["y = 2\n"]
    assert program_texts("x = '''\n`` no fence\n'''") == ["x = '''\n`` no fence\n'''"]
    assert program_texts("````\n```\nx\n```\n````") == ["```\nx\n```\n"]
    assert program_texts("```\nx = 1\n```\n```\ny") == []
    listed = "1. So:\n\n   ```python\n   def f():\n       return 1\n\n  # less\n   ```\n2. Done."
    assert program_texts(listed) == ["def f():\n    return 1\n\n# less\n"]
    assert program_texts("```\n    return 1\n```", "def f():") == ["def f():\n    return 1\n"]
    assert program_texts("x" * 200_000) == []
    assert program_texts("", "def f(): ")[0] == "def f(): "


# ---- in evaluations and in training ----


def test_pass_at_1_counts_programs(verifier: Verifier) -> None:
    _, tokenizer = zoo.load("student")
    model: Any = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=0))
    problems = [{**row(f"assert f() == {n}"), "prompt": [{"role": "user", "content": f"{n}?"}]} for n in range(3)]

    def sampler(*_: Any, prompts: list[list[int]], rollout_index: list[int], **__: Any) -> Rollout:
        """Each problem has one right answer of two."""
        rollout = Rollout()
        for ids, index in zip(prompts, rollout_index, strict=True):
            number = re.search(r"user\n(\d)", tokenizer.decode(ids))
            assert number is not None
            rollout.completions.append(tokenizer.encode(f"f=lambda: {number[1]}{'+1' * index}"))
            rollout.stopped.append(True)
        return rollout

    result = evaluate(
        model, tokenizer, problems, n=2, max_new_tokens=32, verifier=verifier, progress=False, sampler=sampler
    )
    assert (result.correct, result.pass_at_1) == ([1, 1, 1], 0.5)


def test_a_run_on_programs_is_rewarded_and_evaluated(tmp_path: Path) -> None:
    data = "zoo:programs?operations=2"
    small = {**SMALL, "train_data": data, "eval_data": data, "max_prompt_length": 64, "max_steps": 2}
    run.train(make_recipe(small), tmp_path)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [step["trb/reward"] for step in steps if "trb/reward" in step] == [0.0, 0.0]  # models of another task
    results = json.loads((tmp_path / "results.json").read_text())
    assert "'pass_at_1': 0.0" in str(results)


# ---- processes ----

SCRIPT = """
import json, sys
from trb.tasks.programs import Programs
runner = Programs(600.0)
job = {"readings": ["f = lambda: 1"], "prefix": "", "setup": "", "entry_points": ["f"], "reference": ""}
job["tests"] = ["f()"]
assert runner.run([job]) == ["passed"]
print(runner._server._process.pid, flush=True)
runner.run([{**job, "readings": ["while True: pass"]}] * 2)
"""


def test_a_killed_caller_leaves_no_program() -> None:
    """Although these would have ten minutes."""
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        server = psutil.Process(int(caller.stdout.readline()))
        while not (left := server.children(recursive=True)):
            assert caller.poll() is None
        caller.kill()
    assert psutil.wait_procs([server, *left], timeout=20)[1] == []


# Answers once, wrongly, and then works for itself.
STAYS = """
import sys
def f():
    sys.modules["trb.tasks.values"].Channel.receive = spin
    return 2
def spin(self):
    while True: pass
"""


def test_a_program_ends_with_its_tests() -> None:
    """Although it would have ten minutes."""
    runner = programs.Programs(600.0, at_once=1)
    job = {"prefix": "", "setup": "", "entry_points": ["f"], "reference": "", "tests": ["assert f() == 1"]}
    assert runner.run([{**job, "readings": [STAYS]}]) == ["failed"]
    server = psutil.Process(runner._server._process.pid)  # type: ignore[union-attr]
    assert psutil.wait_procs(server.children(recursive=True), timeout=20)[1] == []
    runner.close()


def test_an_interrupted_caller_leaves_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = programs.Programs(600.0, at_once=1)
    job = {"prefix": "", "setup": "", "entry_points": ["f"], "reference": "", "tests": ["f()"]}
    assert runner.run([{**job, "readings": ["f = lambda: 1"]}]) == ["passed"]
    server = psutil.Process(runner._server._process.pid)  # type: ignore[union-attr]

    def interrupt(judges: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(programs, "_heard", interrupt)
        runner.run([{**job, "readings": ["while True: pass"]}])
    assert not server.is_running()
    assert runner.run([{**job, "readings": ["f = lambda: 1"]}]) == ["passed"]
    runner.close()


def test_a_server_that_died_between_calls_is_replaced(verifier: Verifier) -> None:
    assert verifier.score(["f = lambda: 1"], [row("f()")]) == [1.0]
    process = verifier._programs._server._process  # type: ignore[union-attr]
    process.kill()
    process.wait()
    assert verifier.score(["f = lambda: 1"], [row("f()")]) == [1.0]


def test_a_system_that_filters_no_system_calls_runs_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_calls.sys, "platform", "darwin")
    with Verifier() as verifier, pytest.raises(OperationError, match=r"on Linux only, and this is darwin.*container"):
        verifier.score(["f = lambda: 1"], [row("f()")])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("host.forbid_system_calls = lambda: None", "can start a process, open a file, open a socket"),
        ("host.limit_resources = lambda *_, **__: False", "does not limit the memory"),
        ("host.signal.setitimer = 1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_confinement_that_does_not_hold_is_noticed(
    monkeypatch: pytest.MonkeyPatch, broken: str, message: str
) -> None:
    boot = f"import trb.tasks.program_host as host; {broken}; from trb.tasks.program_host import serve"
    monkeypatch.setattr(programs, "_BOOT", programs._BOOT.replace("from trb.tasks.program_host import serve", boot))
    with Verifier() as verifier, pytest.raises(OperationError, match=message):
        verifier.score(["f = lambda: 1"], [row("f()")])
