"""pass@1 and its interval, resuming a killed run exactly, the benchmarks' local copies."""

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import student_stopping_as_the_teacher
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.normalizers import Strip
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trb import zoo
from trb.measures import pass_at_1_interval
from trb.policies import StudentPolicy
from trb.sampling import Rollout, prompt_key, stream_seed
from trb.tasks.evaluation import BENCHMARKS, EvalResult, evaluate, load_benchmark
from trb.tasks.grading import VERIFIERS, Verifier
from trb.tasks.prompts import MATH_SYSTEM_PROMPT, load_prompts, render
from trb.vocab import SharedVocabulary

BENCHMARK_COPIES = Path(__file__).parent / "data" / "benchmarks"
STOP = "<stop>"
MODEL = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=0))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, a stop token with id 0, and a chat template that marks the turns."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(BPE({token: index for index, token in enumerate([STOP, *alphabet])}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        eos_token=STOP,
        chat_template="{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]",
    )


def problems(n: int) -> list[dict]:
    return [
        {"prompt": [{"role": "user", "content": f"{i}?"}], "answer": str(i), "verifier": "exact", "metadata": "{}"}
        for i in range(n)
    ]


class FakeSampler:
    """Answers rightly in a pattern that depends, as the real one does, on (seed, prompt key, rollout index) alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, fail_after: int | None = None) -> None:
        self.tokenizer, self.fail_after = tokenizer, fail_after
        self.calls: list[dict] = []

    def right(self, seed: int, key: int, index: int) -> bool:
        return np.random.default_rng([seed, key, index]).random() < 0.4

    def __call__(self, student, teacher, prompts, policy, **options) -> Rollout:
        if self.fail_after is not None and len(self.calls) >= self.fail_after:
            raise KeyboardInterrupt
        self.calls.append({"prompts": prompts, "policy": policy, **options})
        assert teacher is None
        rollout = Rollout()
        for ids, key, index in zip(prompts, options["prompt_keys"], options["rollout_index"], strict=True):
            number = self.tokenizer.decode(ids).split("]")[1].split("?")[0]
            right = self.right(options["seed"], key, index)
            text = f"\\boxed{{{number if right else 'x'}}}" + "!" * (index % 3)
            stopped = index % 4 != 3
            rollout.completions.append(self.tokenizer(text)["input_ids"] + ([0] if stopped else []))
            rollout.stopped.append(stopped)
        return rollout


def run(tokenizer: PreTrainedTokenizerFast, sampler: FakeSampler | None = None, **options) -> EvalResult:
    defaults = {"problems": problems(7), "n": 4, "max_new_tokens": 32, "max_rows": 8, "seed": 3, "progress": False}
    sampler = sampler or FakeSampler(tokenizer)
    return evaluate(MODEL, tokenizer, **(defaults | options), sampler=sampler)


def test_a_problem_that_is_too_long_is_found_before_anything_is_sampled(tmp_path: Path) -> None:
    student, tokenizer = zoo.load("student")
    rows = zoo.problems(8, seed=0, split="test")
    rows[6]["prompt"][0]["content"] = "1 + 1 " * 600
    path = tmp_path / "results.jsonl"
    with pytest.raises(
        ValueError, match=r"chains\[6\] has \d+ tokens, and with max_new_tokens=5 more exceeds the 512 "
    ):
        evaluate(student, tokenizer, rows, n=1, max_new_tokens=5, max_rows=2, results_path=path, name="chains")
    assert not path.exists()


def test_a_problem_that_is_no_token_is_found_before_anything_is_sampled(tmp_path: Path) -> None:
    student, tokenizer = zoo.load("student")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.backend_tokenizer.normalizer = Strip()
    rows = zoo.problems(8, seed=0, split="test")
    rows[6]["prompt"][0]["content"] = "  "
    path = tmp_path / "results.jsonl"
    with pytest.raises(ValueError, match=r"^chains\[6\] has no tokens.*1 of 8 rows"):
        evaluate(student, tokenizer, rows, n=1, max_new_tokens=5, max_rows=2, results_path=path, name="chains")
    assert not path.exists()


# --- pass@1 ----------------------------------------------------------------------------------------------


def test_result_counts_what_was_sampled(tokenizer: PreTrainedTokenizerFast) -> None:
    sampler = FakeSampler(tokenizer)
    result = run(tokenizer, sampler)
    seed = stream_seed(3, "eval", "eval")
    keys = [prompt_key(ids) for ids in render(tokenizer, problems(7))]
    right = [[sampler.right(seed, key, index) for index in range(4)] for key in keys]
    texts = [len("\\boxed{i}") + index % 3 + (index % 4 != 3) for _ in keys for index in range(4)]
    assert result.pass_at_1 == pytest.approx(np.mean(right))
    assert 0 < result.pass_at_1 < 1
    assert (result.n_problems, result.n_samples) == (7, 28)
    assert result.mean_length == pytest.approx(np.mean(texts))
    assert result.stop_rate == 0.75
    assert result.to_dict() == {
        "name": "eval",
        "pass_at_1": result.pass_at_1,
        "interval": list(result.interval),
        "n_problems": 7,
        "n_samples": 28,
        "mean_length": result.mean_length,
        "stop_rate": 0.75,
    }
    json.dumps(result.to_dict())


def test_the_sampler_is_asked_for_every_rollout_of_every_problem(tokenizer: PreTrainedTokenizerFast) -> None:
    sampler = FakeSampler(tokenizer)
    run(tokenizer, sampler, temperature=0.7)
    prompts = render(tokenizer, problems(7))
    assert [len(call["prompts"]) for call in sampler.calls] == [8, 8, 8, 4]
    assert [ids for call in sampler.calls for ids in call["prompts"]] == [ids for ids in prompts for _ in range(4)]
    assert [i for call in sampler.calls for i in call["rollout_index"]] == [0, 1, 2, 3] * 7
    for call in sampler.calls:
        assert call["prompt_keys"] == [prompt_key(ids) for ids in call["prompts"]]
        assert call["policy"] == StudentPolicy()
        assert (call["temperature"], call["max_new_tokens"], call["eos_token_id"]) == (0.7, 32, [0])
        assert call["max_rows"] == 8


def test_a_model_of_a_pair_stops_with_every_stop_id_of_the_pair() -> None:
    """A base model often puts its stop probability on its teacher's id: in training that ends a completion."""
    (student, tokenizer), (teacher, teacher_tokenizer) = zoo.load("student"), zoo.load("teacher")
    other = student_stopping_as_the_teacher()
    pair = SharedVocabulary.of_pair(student, teacher, tokenizer, teacher_tokenizer)
    chains = zoo.problems(4, seed=3, split="test")
    options: dict = {"n": 2, "max_new_tokens": 48, "progress": False}
    expected = evaluate(student, tokenizer, chains, **options, vocabulary=pair)
    assert expected.stop_rate > 0.7
    assert evaluate(other, tokenizer, chains, **options, vocabulary=pair) == expected
    assert evaluate(other, tokenizer, chains, **options).stop_rate < 0.3, "its own stop ids alone do not end it"


def test_result_depends_on_seed_and_name_but_not_on_chunks(tokenizer: PreTrainedTokenizerFast) -> None:
    result = run(tokenizer)
    assert run(tokenizer, max_rows=1) == run(tokenizer, max_rows=None) == run(tokenizer, max_rows=13) == result
    assert run(tokenizer, seed=4).pass_at_1 != result.pass_at_1
    assert run(tokenizer, name="other").pass_at_1 != result.pass_at_1


def test_given_verifier_is_used_and_left_open(tokenizer: PreTrainedTokenizerFast) -> None:
    class AllRight:
        def score(self, completions: list[str], rows: list[dict]) -> list[float]:
            assert [row["answer"] for row in rows] == sorted(row["answer"] for row in rows)
            return [1.0] * len(completions)

    assert run(tokenizer, verifier=AllRight()).pass_at_1 == 1.0


def a_multiple(completion: str, row: Mapping[str, Any]) -> float:
    """A verifier from outside the package: the last digits are a multiple of what follows the verifier's name."""
    if not row["metadata"].strip("{}"):
        return math.nan
    digits = re.findall("[0-9]+", completion)
    return bool(digits) and int(digits[-1]) % int(row["verifier"].partition(":")[2]) == 0


def test_a_verifier_from_outside_is_loaded_scored_and_evaluated_with(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i}?", "verifier": "multiple:3", "metadata": '{"any": 1}'} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"row 1 of .* is 'multiple:3'; use one of 'math', 'exact', 'reasoning-gym:"):
        load_prompts(path)
    monkeypatch.setitem(VERIFIERS, "multiple:", a_multiple)
    loaded = list(load_prompts(path))
    with Verifier() as verifier:
        assert verifier.score(["12", "13", ""], loaded[:3]) == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"unknown verifier 'multiple'; use one of .*'multiple:NAME'"):
        verifier.score(["12"], [loaded[0] | {"verifier": "multiple"}])

    class AllTheirNumbers(FakeSampler):
        def right(self, seed: int, key: int, index: int) -> bool:
            return True

    assert run(tokenizer, AllTheirNumbers(tokenizer), problems=loaded, n=2).pass_at_1 == 0.5  # 0 and 3, not 1 and 2
    with pytest.raises(ValueError, match="problem 2 of 2 has no answer"):
        run(tokenizer, problems=[loaded[0], loaded[1] | {"metadata": "{}"}])


def test_progress_bar_goes_to_stderr(tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture) -> None:
    run(tokenizer, progress=True, name="chains")
    captured = capsys.readouterr()
    assert captured.out == "" and "chains" in captured.err
    run(tokenizer)
    assert capsys.readouterr().err == ""


def test_bad_problems(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = problems(3)
    rows[1]["answer"] = ""
    with pytest.raises(ValueError, match="problem 2 of 3 has no answer"):
        run(tokenizer, problems=rows)
    with pytest.raises(ValueError, match="at least one problem"):
        run(tokenizer, problems=[])
    with pytest.raises(ValueError, match="n=0"):
        run(tokenizer, n=0)


# --- the interval ----------------------------------------------------------------------------------------


def test_interval_inverts_the_score_test() -> None:
    """Oracle: the ends are the rates whose own binomial deviation puts the estimate 1.96 deviations away."""
    counts, n = [0, 3, 8, 8, 1, 5, 0, 2, 7, 8, 4, 6], 8
    rates = np.array(counts) / n
    effective = rates.mean() * (1 - rates.mean()) / (np.std(rates, ddof=1) ** 2 / len(rates))
    for end in pass_at_1_interval(counts, n):
        assert abs(rates.mean() - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / effective), rel=1e-6)


def test_interval_at_the_edges() -> None:
    low, high = pass_at_1_interval([0] * 20, 64)
    assert low == 0 and 0.1 < high < 0.2  # 20 problems: 3.84 / (20 + 3.84)
    assert pass_at_1_interval([64] * 20, 64) == pytest.approx((1 - high, 1.0))
    assert pass_at_1_interval([4] * 20, 8) == pytest.approx(pass_at_1_interval([1, 0] * 10, 1), abs=0.02)
    low, high = pass_at_1_interval([3], 4)
    assert low < 0.25 and high > 0.95  # one problem says next to nothing
    low, high = pass_at_1_interval([50, 50, 50, 51], 100)
    assert high - low > 2 * 1.9 * math.sqrt(0.25 / 400)  # never better than independent completions


CLUSTERED = [(30, 64, 1, 1), (100, 8, 2, 20), (100, 64, 0.3, 0.3), (400, 1, 1, 2)]


@pytest.mark.parametrize(("size", "n", "a", "b"), CLUSTERED)
def test_interval_coverage(size: int, n: int, a: float, b: float) -> None:
    """Problems of Beta-distributed difficulty, 1500 evaluations: 95% coverage within 2.5 points (4 standard errors).

    Treating all completions as independent, as the naive interval does, must fail the same test where n > 1.
    """
    rng = np.random.default_rng(11)
    truth, covered, naive = a / (a + b), 0, 0
    for _ in range(1500):
        counts = rng.binomial(n, rng.beta(a, b, size)).tolist()
        low, high = pass_at_1_interval(counts, n)
        covered += low <= truth <= high
        rate = sum(counts) / (n * size)
        naive += abs(rate - truth) <= 1.96 * math.sqrt(rate * (1 - rate) / (n * size))
    assert abs(covered / 1500 - 0.95) < 0.025
    assert (abs(naive / 1500 - 0.95) < 0.025) == (n == 1)


def test_interval_over_copies_of_problems_is_over_the_distinct_ones() -> None:
    counts = [0, 3, 8, 8, 1, 5, 0, 2, 7, 8, 4, 6]
    twice = pass_at_1_interval(counts * 2, 8, [*range(12)] * 2)
    assert twice == pytest.approx(pass_at_1_interval(counts, 8))
    assert pass_at_1_interval(counts, 8, range(12)) == pass_at_1_interval(counts, 8)
    assert pass_at_1_interval([8] * 9, 8, [0, 0, 0, 0, 1, 2, 3, 3, 4])[1] == 1.0


def test_interval_coverage_with_copies() -> None:
    """60 distinct problems, a fifth of them five times; copies get the same answers, as the same noise draws them.

    Coverage is within 2.5 points of 95%, and counting copies as problems must fail that.
    """
    rng = np.random.default_rng(12)
    which = np.repeat(np.arange(60), np.where(np.arange(60) < 12, 5, 1))
    covered = naive = 0
    for _ in range(1500):
        counts = rng.binomial(8, rng.beta(1, 1, 60))[which].tolist()
        for units in (which.tolist(), None):
            low, high = pass_at_1_interval(counts, 8, units)
            covered += (units is not None) * (low <= 0.5 <= high)
            naive += (units is None) * (low <= 0.5 <= high)
    assert abs(covered / 1500 - 0.95) < 0.025 < abs(naive / 1500 - 0.95)


def test_copies_of_a_problem_are_told_and_count_once(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    plain = run(tokenizer)
    assert plain.same_as == [] and plain.outcomes == {"correct": plain.correct}
    twice = run(tokenizer, problems=problems(7) * 2, results_path=tmp_path / "results.jsonl")
    assert twice.interval == pytest.approx(plain.interval)
    assert (twice.pass_at_1, twice.n_problems) == (plain.pass_at_1, 14)
    assert twice.outcomes == {"correct": plain.correct * 2, "same_as": [*range(7)] * 2}
    assert "same_as" not in twice.to_dict()
    assert run(tokenizer, problems=problems(7) * 2, results_path=tmp_path / "results.jsonl") == twice


# --- results files ---------------------------------------------------------------------------------------


def test_results_file_holds_one_record_per_problem(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    result = run(tokenizer, results_path=path, save_completions=2)
    header, *records = [json.loads(line) for line in path.read_text().splitlines()]
    assert header["settings"]["n"] == 4
    assert [record["problem"] for record in records] == list(range(7))
    assert sum(record["correct"] for record in records) / 28 == pytest.approx(result.pass_at_1)
    assert {len(record["lengths"]) for record in records} == {len(record["stopped"]) for record in records} == {4}
    assert all(len(record["completions"]) == 2 and "boxed" in record["completions"][0] for record in records)
    assert [record["question"] for record in records] == [row["prompt"][-1]["content"] for row in problems(7)]
    right = [["{x}" not in text for text in record["completions"]] for record in records]
    assert [record["right"] for record in records] == right and {True, False} <= {one for row in right for one in row}


def test_texts_are_kept_of_so_many_problems_and_of_no_more(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trb.tasks.evaluation.PROBLEMS_WITH_TEXTS", 3)
    run(tokenizer, results_path=tmp_path / "results.jsonl", save_completions=9)
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()[1:]]
    assert [len(record.get("completions", ())) for record in records] == [4, 4, 4, 0, 0, 0, 0]
    assert len(records) == 7 and all(record["n"] == len(record["lengths"]) == 4 for record in records)
    assert records[2]["prompt_hash"] == f"{prompt_key(render(tokenizer, problems(7))[2]):016x}"


def test_a_finished_file_is_read_not_sampled_again(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first, content = run(tokenizer, results_path=path), path.read_bytes()
    sampler = FakeSampler(tokenizer, fail_after=0)
    assert run(tokenizer, sampler, results_path=path) == first
    assert path.read_bytes() == content and sampler.calls == []


def test_interrupted_and_resumed_equals_uninterrupted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    expected = run(tokenizer, results_path=whole)
    with pytest.raises(KeyboardInterrupt):
        run(tokenizer, FakeSampler(tokenizer, fail_after=2), results_path=path)
    assert len(path.read_text().splitlines()) == 1 + 4
    sampler = FakeSampler(tokenizer)
    assert run(tokenizer, sampler, results_path=path) == expected
    assert len(sampler.calls) == 2
    assert path.read_bytes() == whole.read_bytes()


def test_a_file_torn_anywhere_is_repaired(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    expected = run(tokenizer, results_path=whole)
    content = whole.read_bytes()
    for cut in [*range(0, len(content), 41), len(content) - 1]:
        path.write_bytes(content[:cut])
        sampler = FakeSampler(tokenizer)
        assert run(tokenizer, sampler, results_path=path) == expected
        assert path.read_bytes() == content
        # Batches are those of the uninterrupted run, whatever was left of the last one.
        whole_lines = content[:cut].count(b"\n")
        assert len(sampler.calls) == 4 - max(0, whole_lines - 1) // 2


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("n", 5, "n is 4 there and 5 here"),
        ("seed", 4, "seed is 3 there and 4 here"),
        ("max_new_tokens", 33, "max_new_tokens is 32 there and 33 here"),
        ("temperature", 0.5, "temperature is 1.0 there and 0.5 here"),
        ("name", "other", "name is 'eval' there and 'other' here"),
        ("vocabulary", SharedVocabulary(257, 0, (4,)), r"stop_ids is \[0\] there and \[0, 4\] here"),
        ("problems", problems(8), "n_problems is 7 there and 8 here"),
        ("problems", [problems(8)[i] for i in (0, 1, 2, 3, 4, 5, 7)], "problems is"),
        ("problems", [row | {"answer": "1"} for row in problems(7)], "problems is"),
    ],
)
def test_a_file_of_other_settings_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, option: str, value: object, message: str
) -> None:
    path = tmp_path / "results.jsonl"
    run(tokenizer, results_path=path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=f"another evaluation .*{message}.*results_path"):
        run(tokenizer, results_path=path, **{option: value})
    assert path.read_bytes() == content


def test_a_file_of_a_model_that_the_call_does_not_name_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    expected = run(tokenizer, results_path=path, about={"model": "A", "revision": None})
    with pytest.raises(ValueError, match="model is 'A' there and None here"):
        run(tokenizer, results_path=path)
    # A setting that is None is one that is not there.
    assert run(tokenizer, results_path=path, about={"model": "A"}) == expected


def test_rows_of_ones_own_verifier_need_no_answer(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VERIFIERS, "short", lambda completion, row: float(len(completion) < 10))
    own = [{"prompt": row["prompt"], "verifier": "short"} for row in problems(2)]
    path = tmp_path / "results.jsonl"
    whole = run(tokenizer, problems=own, results_path=path)
    assert whole.pass_at_1 is not None
    assert run(tokenizer, problems=[row | {"answer": None} for row in own], results_path=path) == whole
    for answer in (b"1", {1}, 1):  # and whatever it is, it may be what the verifier reads
        with pytest.raises(ValueError, match="problems is"):
            run(tokenizer, problems=[row | {"answer": answer} for row in own], results_path=path)


@pytest.mark.parametrize("content", ["my notes\n", "my notes", '{"step": 1}\n', "[1]\n", "\n\n"])
def test_a_foreign_file_is_left_alone(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="use another results_path"):
        run(tokenizer, results_path=path)
    assert path.read_text() == content


def test_a_damaged_middle_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    run(tokenizer, results_path=path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], lines[3][:10] + "\n", *lines[4:]]))
    with pytest.raises(ValueError, match="line 4 of"):
        run(tokenizer, results_path=path)
    path.write_text("".join([*lines[:3], *lines[4:]]))
    with pytest.raises(ValueError, match=r"line 4 of .* is not problem 2"):
        run(tokenizer, results_path=path)


def test_with_the_real_sampler_resumed_equals_uninterrupted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).train()
    rows = [row | {"verifier": "math"} for row in problems(5)]
    options = {"n": 3, "max_new_tokens": 6, "max_rows": 6, "progress": False}
    with Verifier() as verifier:
        expected = evaluate(model, tokenizer, rows, results_path=tmp_path / "a", verifier=verifier, **options)
        lines = (tmp_path / "a").read_bytes().splitlines(keepends=True)
        (tmp_path / "b").write_bytes(b"".join(lines[:4]))
        assert evaluate(model, tokenizer, rows, results_path=tmp_path / "b", verifier=verifier, **options) == expected
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert 1 < expected.mean_length <= 6
    assert model.training


# --- benchmarks ------------------------------------------------------------------------------------------

EXPECTED = {
    "gsm8k": ["39", "1,050"],
    "math500": ["\\frac{3}{4}", "(-2,2)"],
    "amc": ["6", "142"],
    "olympiadbench": ["3, -3", "\\frac{\\sqrt{2}}{2}"],
    "aime24": ["042"],
    "aime25": ["10"],
}
RIGHT = {
    "gsm8k": ["39", "1050"],
    "math500": ["0.75", "-2 < x < 2"],
    "amc": ["6", "142.0"],
    "olympiadbench": ["-3, 3", "\\frac{1}{\\sqrt 2}"],
    "aime24": ["42"],
    "aime25": ["010"],
}


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("form", ["folder", "jsonl", "parquet"])
def test_benchmark_copies_load_and_score(
    name: str, form: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    path = tmp_path / "copy"
    shutil.copytree(BENCHMARK_COPIES / name, path)
    if form != "folder":
        path = next(path.iterdir())
    if form == "parquet":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path = tmp_path / "copy.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    benchmark = load_benchmark(name, path)
    assert benchmark["answer"] == EXPECTED[name]
    assert all(prompt[0] == {"role": "system", "content": MATH_SYSTEM_PROMPT} for prompt in benchmark["prompt"])
    assert all(prompt[1]["content"].endswith(("?", ".")) for prompt in benchmark["prompt"])
    if form == "folder":
        with Verifier() as verifier:
            rows = benchmark.to_list()
            assert verifier.score([f"\\boxed{{{answer}}}" for answer in RIGHT[name]], rows) == [1.0] * len(rows)
            assert verifier.score(["\\boxed{99}"] * len(rows), rows) == [0.0] * len(rows)


def test_benchmarks_come_from_their_public_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fake(path: str, config: str | None, **options: object) -> datasets.Dataset:
        asked.append((path, config, options["split"]))
        rows = next((BENCHMARK_COPIES / name).iterdir()).read_text().splitlines()
        return datasets.Dataset.from_list([json.loads(row) for row in rows])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    for name in BENCHMARKS:
        assert load_benchmark(name)["answer"] == EXPECTED[name]
    assert asked == [
        ("openai/gsm8k", "main", "test"),
        ("HuggingFaceH4/MATH-500", None, "test"),
        ("AI-MO/aimo-validation-amc", None, "train"),
        ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),
        ("HuggingFaceH4/aime_2024", None, "train"),
        ("math-ai/aime25", None, "test"),
    ]


def test_samples_per_problem_are_those_of_the_paper() -> None:
    assert {name: benchmark.n for name, benchmark in BENCHMARKS.items()} == {
        "gsm8k": 32,
        "math500": 64,
        "olympiadbench": 64,
        "amc": 512,
        "aime24": 512,
        "aime25": 512,
    }


def test_unknown_benchmark_and_wrong_columns(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown benchmark 'math-500'; choose one of .*; did you mean 'math500'"):
        load_benchmark("math-500")
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "one", "answer": "1"}\n')
    with pytest.raises(ValueError, match="no column 'question'"):
        load_benchmark("gsm8k", path)
