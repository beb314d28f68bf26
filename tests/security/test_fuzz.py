"""Any bytes in a file of somebody else: read, or refused in an error that names the file. Nothing third.

These are properties for hypothesis with few, repeatable examples. `make fuzz` runs the same functions for longer, and
guided by coverage where atheris is installed; what it finds becomes an `@example` here.
"""

import io
import json
import math
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.utils import _create_file_view

from trb.report import ReportError, write_report
from trb.safety.confinement import arithmetic
from trb.safety.untrusted import check_checkpoint, lora_options, parse_yaml, printable
from trb.studies.recipe import load_recipe
from trb.studies.study import load_study
from trb.studies.yaml_files import ConfigError
from trb.tasks.answers import boxed_answers
from trb.tasks.grading import Verifier, _prepare
from trb.tasks.prompts import load_prompts

EXAMPLES = int(os.environ.get("TRB_FUZZ_EXAMPLES", "25"))
few = settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


def in_folder(check: Callable[[Path], None]) -> None:
    """pytest's tmp_path is one per test, not one per example."""
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder))


# ---- what files are made of ----

# Half surrogates are legal in JSON and not in UTF-8.
text = st.text(st.characters(exclude_categories=[]), max_size=20)
numbers = st.one_of(
    st.integers(-5, 5),
    st.floats(),
    st.integers(10**300, 10**310),
    st.sampled_from([math.nan, math.inf, -0.0, 1e308, 2**63, True]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, text)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4), max_leaves=8
)


def objects(keys: list[str], usual: dict[str, Any] | None = None) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of the keys that a reader looks for, some with their usual value and some with any."""
    parts = {key: st.one_of(st.just((usual or {}).get(key)), values) for key in keys}
    return st.fixed_dictionaries({}, optional=parts)


def lines(records: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """The bytes of a JSONL file: whole, cut off, or with bytes replaced."""
    whole = st.lists(records, max_size=4).map(lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode())
    cut = st.tuples(whole, st.integers(0, 200)).map(lambda pair: pair[0][: pair[1]])
    return st.one_of(whole, cut, damaged(whole), st.binary(max_size=60))


def damaged(content: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    def replace(pair: tuple[bytes, list[tuple[int, int]]]) -> bytes:
        array = bytearray(pair[0])
        for place, byte in pair[1]:
            if array:
                array[place % len(array)] = byte
        return bytes(array)

    return st.tuples(content, st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=4)).map(replace)


def as_json(records: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    return damaged(records.map(lambda record: json.dumps(record).encode()))


# ---- prompts ----

MESSAGES = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\\boxed{1}"}]
PROMPT = {"prompt": "x", "messages": MESSAGES, "answer": "1", "verifier": "math", "metadata": "{}", "from": "human"}


@few
@given(lines(st.one_of(values, objects(list(PROMPT), PROMPT))), st.sampled_from([".jsonl", ".json", ".parquet"]))
@example(b'{"prompt": "\\ud800"}', ".jsonl")
@example(b'{"prompt": "x", "answer": 1e400}', ".jsonl")
@example(b'{"prompt": "x", "answer": ' + b"1" * 400 + b"}", ".jsonl")
@example(b'{"prompt": ' + b"[" * 990 + b"]" * 990 + b"}", ".jsonl")
@example(b"[" * 100_000, ".json")
@example(b"PAR1\x15\x04PAR1", ".parquet")
def test_prompt_files(content: bytes, suffix: str) -> None:
    def check(folder: Path) -> None:
        path = folder / f"data{suffix}"
        path.write_bytes(content)
        try:
            rows = load_prompts(path).to_list()
        except ValueError as error:
            assert str(path) in str(error)
            return
        for row in rows:
            assert all(isinstance(row[key], str) for key in ("answer", "verifier", "metadata"))
            assert [message["role"] for message in row["prompt"]].count("user") >= 1

    in_folder(check)


# ---- recipes and studies ----

YAML_PIECES = st.sampled_from(
    [
        "student: zoo:student\n",
        "teacher: zoo:teacher\n",
        "train_data: zoo:chains\n",
        "methods:\n",
        "  trb: {}\n",
        "  '../x': {method: opd}\n",
        "seed: &a 1\n",
        "max_steps: *a\n",
        "a: &b [*b]\n",
        "<<: {seed: 1}\n",
        "? [1]\n",
        "- x\n",
        "!!set {a}\n",
        "!!binary ''\n",
        "seed: !!int ''\n",
        "seed: !!timestamp x\n",
        "---\n",
        "%YAML 1.9\n",
        "\t\n",
        "'\n",
        "settings: {a: {}}\n",
        "seeds: {select: [1], test: 2}\n",
        "eval_samples: {'': 1}\n",
        "lora_target_modules: [[x]]\n",
        "learning_rate: .nan\n",
    ]
)
yaml_text = st.one_of(st.lists(st.one_of(YAML_PIECES, text), max_size=6).map("".join), values.map(json.dumps))


@few
@given(yaml_text)
@example("seed: !!bool maybe")
@example("[" * 2000)
@example("a: &a [*a]")
def test_recipes_and_studies(content: str) -> None:
    def check(folder: Path) -> None:
        path = folder / "recipe.yaml"
        path.write_bytes(content.encode("utf-8", errors="surrogatepass"))
        for load in (load_recipe, load_study):
            try:
                load(path)
            except ConfigError as error:
                assert str(path) in str(error)

    in_folder(check)


plain_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=10)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@few
@given(plain_values)
def test_yaml_that_pyyaml_writes_is_read_back(value: Any) -> None:
    assert parse_yaml(yaml.safe_dump([value, value])) == [value, value]


# ---- what a run leaves ----

ROLLOUT = {
    "step": 1,
    "prompt": "x",
    "prompt_key": "k",
    "rollout_index": 0,
    "completion": "y",
    "tokens": ["y"],
    "reward": 1.0,
    "teacher_weight": [0.5],
    "kl_student": [0.1],
    "accepted": [True],
    "student_log_prob": [-1.0],
    "teacher_log_prob": [-1.0],
    "alternatives": [{"student": [["y", 0.5]], "teacher": [], "behavior": []}],
}
SCORE = {"pass_at_1": 0.5, "interval": [0.4, 0.6], "n_problems": 2, "n_samples": 2, "name": "x", "step": 1}
SETTINGS = {"a": {"methods": {"opd": SCORE}}}
RUN_FILES = {
    "rollouts.jsonl": lines(objects(list(ROLLOUT), ROLLOUT)),
    "metrics.jsonl": lines(objects(["step", "loss", "trb/reward"], {"step": 1, "loss": 1.0})),
    "held_out.jsonl": lines(objects(["step", "loss"], {"step": 1, "loss": 1.0})),
    "evals.jsonl": lines(objects(list(SCORE), SCORE)),
    "results.json": as_json(objects(["trb", "student", "provenance"], {"trb": SCORE, "student": SCORE})),
    "provenance.json": as_json(objects(["commit", "time", "versions"])),
    "config.yaml": yaml_text.map(lambda x: x.encode(errors="surrogatepass")),
    "study.json": as_json(objects(["settings", "average", "level", "diagnostics", "name"], {"settings": SETTINGS})),
    "probe.json": as_json(objects(["curve", "continuation", "replaced"])),
}


@few
@given(st.fixed_dictionaries({}, optional=RUN_FILES))
@example({"metrics.jsonl": b'{"step": 1e308, "loss": 1}\n'})
@example({"rollouts.jsonl": b'{"step": 1, "tokens": [[[]]], "prompt": "\\ud800"}\n'})
def test_reports(files: dict[str, bytes]) -> None:
    def check(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        try:
            page = write_report(folder).read_text(encoding="utf-8")
        except ReportError as error:
            assert str(folder) in str(error)
            return
        assert page.count("<script") == 2  # ours, and the data

    in_folder(check)


# ---- checkpoints ----


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


OPTIMIZER = saved({"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]})
OPCODES = b"(.0123FIJKLMNPQRSTUVXabcdeghijlopqrstu}]\x80\x81\x82\x85\x86\x87\x8c\x93\x94"
pickles = st.one_of(
    damaged(st.just(OPTIMIZER)),
    st.lists(st.sampled_from([bytes([code]) for code in OPCODES] + [b"cos\nsystem\n", b"\x8c\x02os", b"K\x00"])).map(
        b"".join
    ),
    st.binary(max_size=80),
)


@few
@given(pickles, st.sampled_from(["optimizer.pt", "rng_state.pth", ".metadata", "model.safetensors.index.json"]))
@example(b"\x80\x02c__builtin__\nexec\nX\x04\x00\x00\x00raise\x85R.", ".metadata")
@example(b"(lp0\n0.", ".metadata")
def test_checkpoints(content: bytes, name: str) -> None:
    def check(folder: Path) -> None:
        (folder / name).write_bytes(content)
        try:
            check_checkpoint(folder)
        except ValueError as error:
            assert str(folder) in str(error)
            return
        if name.endswith((".pt", ".pth")):  # and what passes is no more than tensors and plain values
            try:
                torch.load(folder / name, weights_only=True)
            except Exception as error:
                assert "Unsupported global" not in str(error)

    in_folder(check)


records = st.dictionaries(
    st.sampled_from(["lr", "weight", "x"]).map(MetadataIndex),
    st.builds(
        _StorageInfo,
        st.one_of(st.sampled_from(["__0_0.distcp", "../x.distcp", ".metadata"]), plain_values),
        st.one_of(st.integers(-2, 3000), plain_values),
        st.one_of(st.integers(-2, 3000), plain_values),
        st.one_of(st.none(), plain_values),
    ),
    max_size=3,
)
kinds = st.dictionaries(st.sampled_from(["lr", "weight"]), st.one_of(st.just(BytesStorageMetadata()), plain_values))


@few
@given(st.one_of(kinds, plain_values), st.one_of(records, plain_values), pickles)
def test_sharded_checkpoints(described: Any, stored: Any, content: bytes) -> None:
    def check(folder: Path) -> None:
        metadata = Metadata(described, storage_data=stored)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        (folder / "__0_0.distcp").write_bytes(content)
        try:
            check_checkpoint(folder)
        except ValueError as error:
            assert str(folder) in str(error)
            return
        for record in stored.values():  # what passes is what torch may read as it likes
            torch.load(_create_file_view((folder / record.relative_path).open("rb"), record.offset, record.length))

    in_folder(check)


LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 1}, "bias": "none"}


@few
@given(as_json(objects([*LORA, "init_lora_weights", "auto_mapping", "later"], LORA)))
def test_adapter_configurations(content: bytes) -> None:
    def check(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_bytes(content)
        try:
            options = lora_options(path)
        except ValueError as error:
            assert str(path) in str(error)
            return
        assert options.keys() <= LORA.keys() | {"init_lora_weights"}
        for names in ("target_modules", "rank_pattern"):
            assert not set("".join(options.get(names, []))) & set("*+?()[]{}|\\$")

    in_folder(check)


# ---- answers ----

PIECES = r"\boxed{ } { \frac ^ _ 9 x ! \text{ \sqrt ( ) [ ] , $ \\ \ = \pi & \int \sum_{k=1}^{ \cup \{ ' A (B) % 1e9 √"
TAGS = ["the answer is ", "\n", "\\begin{pmatrix}", "\\end{pmatrix}", "<answer>", "</answer>", "\0", "\ud800", " "]
LATEX = st.sampled_from([*PIECES.split(), *TAGS])
answers = st.lists(st.one_of(LATEX, text), max_size=25).map("".join)


@few
@given(answers, answers)
@example("\\boxed{" * 20_000, "1")
@example("\\boxed{1}" + ", \\boxed{1}" * 5_000, "1")
def test_answers_are_found_in_any_completion(completion: str, answer: str) -> None:
    boxes = boxed_answers(completion)
    assert all(completion[box.start : box.end].endswith("}") and box.content in completion for box in boxes)
    assert [box.start for box in boxes] == sorted(box.start for box in boxes)
    verdict = _prepare(completion, {"answer": answer})
    if isinstance(verdict, float):
        assert verdict in (0.0, 1.0) or (math.isnan(verdict) and not answer)
    else:
        json.dumps(verdict).encode("ascii")  # what goes to the worker


@pytest.fixture(scope="module")
def verifier() -> Any:
    with Verifier(timeout_s=5) as shared:
        yield shared


@settings(few, max_examples=max(2, EXAMPLES // 8))
@given(st.lists(st.tuples(answers, answers.filter(bool)), min_size=1, max_size=10))
def test_graders_answer_anything_with_a_score(verifier: Verifier, pairs: list[tuple[str, str]]) -> None:
    completions, rows = [one for one, _ in pairs], [{"answer": answer} for _, answer in pairs]
    before = verifier.crashes
    scores = verifier.score([*completions, r"\boxed{x+1}"], [*rows, {"answer": "1+x"}])
    assert all(score in (0.0, 1.0) for score in scores)
    assert scores[-1] == 1.0
    assert verifier.crashes == before


NAMES = st.sampled_from(["exec", "open", "__import__", "x", "print", "int", "True"])
expressions = st.recursive(
    st.one_of(st.integers(0, 9).map(str), NAMES, st.just("'s'")),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "*", "-", ",", " if ", "."]), inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"{pair[0]}({pair[1]})"),
        inner.map(lambda one: f"[{one}]"),
        inner.map(lambda one: f"[{one} for _ in [0]]"),
        inner.map(lambda one: f"(lambda: {one})()"),
        inner.map(lambda one: f"f'{{{one}!r}}'"),
        inner.map(lambda one: f"{{{one}: {one}}}"),
    ),
    max_leaves=6,
)


@few
@given(expressions)
def test_expressions_without_names_are_all_that_is_evaluated(expression: str) -> None:
    try:
        value = arithmetic(expression)
    except (ValueError, SyntaxError, TypeError, OverflowError, MemoryError):
        return
    # Only literals get this far: nothing that was named, and nothing that could be called.
    assert not any(name in expression for name in ("exec", "open", "import", "print", "lambda", "for"))
    assert not callable(value)


# ---- terminals ----


@few
@given(text)
def test_printable_text_is_plain_and_as_long(given_text: str) -> None:
    shown = printable(given_text, lines=False)
    assert shown.isprintable() and len(shown) == len(given_text)
    shown.encode("utf-8")
    assert all(one == other or not other.isprintable() for one, other in zip(shown, given_text, strict=True))
