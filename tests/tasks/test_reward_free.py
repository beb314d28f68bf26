"""Evaluation where nothing checks answers: the numbers against plain forward passes, their intervals, and refusals."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from trb import zoo
from trb.measures import REVERSE_KL, measure_of, token_mean_shares
from trb.sampling import Rollout
from trb.tasks.evaluation import EvalResult, check_problems, evaluate
from trb.tasks.prompts import load_prompts, render
from trb.tasks.reward_free import Judge, token_mean
from trb.vocab import SharedVocabulary

STUDENT, TOKENIZER = zoo.load("student")
TEACHER, TEACHER_TOKENIZER = zoo.load("teacher")
PAIR = SharedVocabulary.of_pair(STUDENT, TEACHER, TOKENIZER, TEACHER_TOKENIZER)
ROWS = list(load_prompts("zoo:dialogue", limit=3, split="test", assistant_turns="all"))


def run(path: Path | None = None, **options) -> EvalResult:
    defaults = {"n": 2, "max_new_tokens": 10, "judge": Judge(TEACHER, PAIR), "progress": False, "max_rows": 8}
    return evaluate(STUDENT, TOKENIZER, ROWS, **(defaults | options), results_path=path)


def by_hand(prompt: list[int], completion: list[int], taught: list[int]) -> tuple[float, float, float]:
    """Sums over the tokens of KL(student || teacher), the student's entropy, and log teacher, from whole passes."""
    laws = []
    for model, before in ((STUDENT, prompt), (TEACHER, taught)):
        with torch.no_grad():
            logits = model(torch.tensor([before + completion])).logits[0, len(before) - 1 : -1]
        laws.append(PAIR.log_probs(logits.double(), 1.0))
    student, teacher = laws
    tokens = torch.tensor([PAIR.event_of(token) for token in completion])[:, None]
    kl = torch.where(student.exp() > 0, student.exp() * (student - teacher), 0.0).sum()
    return kl.item(), torch.special.entr(student.exp()).sum().item(), teacher.gather(1, tokens).sum().item()


def test_the_numbers_are_those_of_plain_passes(tmp_path: Path) -> None:
    seen: list[tuple[list[int], list[int]]] = []

    def sampler(*args, **options) -> Rollout:
        from trb.sampling import sample

        rollout = sample(*args, **options)
        seen.extend(zip(options["prompts"], rollout.completions, strict=True))
        return rollout

    result = run(tmp_path / "results.jsonl", sampler=sampler)
    sums = np.array([by_hand(prompt, completion, prompt) for prompt, completion in seen])
    tokens = sum(len(completion) for _, completion in seen)
    assert len(seen) == result.n_samples == 24
    found = (result.reverse_kl, result.student_entropy, result.teacher_log_prob)
    np.testing.assert_allclose(found, sums.sum(0) / tokens, rtol=1e-4)
    assert result.pass_at_1 is None and "pass_at_1" not in result.to_dict()
    assert measure_of(result.to_dict()) is REVERSE_KL
    assert len(result.values) == 3, "one of each conversation: its turns are not independent"
    assert math.isclose(np.mean(result.values), result.reverse_kl, rel_tol=1e-12)
    low, high = result.interval
    assert low < result.reverse_kl < high
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()[1:]]
    assert {"correct", "right"}.isdisjoint(lines[0]) and len({line["conversation"] for line in lines}) == 3
    assert run(tmp_path / "results.jsonl") == result, "read, not sampled again"


def test_the_teacher_reads_its_own_prompts() -> None:
    own = [{**row, "prompt": [{"role": "user", "content": "1+1"}]} for row in ROWS]
    taught = run(judge=Judge(TEACHER, PAIR, {"eval": own}))
    plain = run()
    assert (taught.student_entropy, taught.mean_length) == (plain.student_entropy, plain.mean_length)
    assert abs(taught.reverse_kl - plain.reverse_kl) > 0.01
    (prompt,) = render(TOKENIZER, ROWS[:1])
    kl, *_ = by_hand(prompt, [9, 10], render(TOKENIZER, own[:1])[0])
    assert abs(kl - by_hand(prompt, [9, 10], prompt)[0]) > 0.01


def test_a_prompt_of_no_token_for_the_teacher_is_named() -> None:
    contents = copy.deepcopy(TOKENIZER)
    contents.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    own = [
        {**row, "prompt": [{"role": "user", "content": "" if place == 2 else "1+1"}]} for place, row in enumerate(ROWS)
    ]
    with pytest.raises(ValueError, match=r"^the teacher's prompt of eval\[2\] has no tokens"):
        evaluate(STUDENT, contents, ROWS, n=1, max_new_tokens=8, judge=Judge(TEACHER, PAIR, {"eval": own}))


def test_a_model_has_no_divergence_from_itself() -> None:
    result = evaluate(
        TEACHER, TEACHER_TOKENIZER, ROWS, n=1, max_new_tokens=8, judge=Judge(TEACHER, PAIR), progress=False
    )
    assert (result.reverse_kl, result.interval) == (0.0, (0.0, 0.0)) and result.student_entropy > 0


def test_intervals_cover_the_ratio() -> None:
    rng, covered, rounds = np.random.default_rng(0), 0, 400
    for _ in range(rounds):
        lengths = rng.integers(1, 20, size=40)
        rates = rng.gamma(2.0, 0.5, size=40)  # mean 1, independent of the lengths
        records = [
            {"problem": i, "lengths": [int(n)], "reverse_kl": float(n * rate)}
            for i, (n, rate) in enumerate(zip(lengths, rates, strict=True))
        ]
        _, (low, high), _ = token_mean(records)
        covered += low <= 1.0 <= high
    assert 0.91 < covered / rounds < 0.975


def test_shares_average_to_the_ratio_and_turns_of_one_conversation_count_once() -> None:
    assert math.isclose(token_mean_shares([3.0, 1.0], [2, 2]).mean(), 1.0)
    turns = [{"problem": i, "conversation": "ab"[i % 2], "lengths": [2], "reverse_kl": float(i)} for i in range(4)]
    value, _, shares = token_mean(turns)
    assert (value, len(shares)) == (6 / 8, 2)
    with pytest.raises(ValueError, match="needs two prompts, of two conversations, for its interval, got 1"):
        token_mean(turns[::2])


def test_a_prompt_that_occurs_several_times_counts_once() -> None:
    def record(place: int, prompt: str, kl: float) -> dict:
        return {"problem": place, "prompt_hash": prompt, "conversation": "", "lengths": [2, 3], "reverse_kl": kl}

    own = [record(place, str(place), kl) for place, kl in enumerate((0.5, 1.5, 4.0))]
    copied = [record(place, str(place % 3), own[place % 3]["reverse_kl"]) for place in range(6)]
    value, interval, shares = token_mean(copied)
    assert value == token_mean(own)[0] and interval == pytest.approx(token_mean(own)[1]) and len(shares) == 3
    with pytest.raises(ValueError, match=r"eval has .* one prompt several times"):
        check_problems(
            STUDENT, TOKENIZER, [{**ROWS[0], "metadata": "{}"}] * 3, n=1, max_new_tokens=8, judge=Judge(TEACHER, PAIR)
        )


def test_one_conversation_is_refused_before_anything_is_sampled() -> None:
    rows = [{**row, "metadata": json.dumps({"conversation": "a"})} for row in ROWS[:3]]
    with pytest.raises(ValueError, match=r"eval has problems of one conversation alone.* raise limit"):
        check_problems(STUDENT, TOKENIZER, rows, n=1, max_new_tokens=8, judge=Judge(TEACHER, PAIR))


def test_results_read_by_another_teacher_are_not_gone_on_with(tmp_path: Path) -> None:
    options = {"n": 1, "max_new_tokens": 8, "progress": False, "results_path": tmp_path / "eval.jsonl"}
    evaluate(STUDENT, TOKENIZER, ROWS, **options, judge=Judge(TEACHER, PAIR))
    with pytest.raises(ValueError, match=r"eval\.jsonl"):
        evaluate(STUDENT, TOKENIZER, ROWS, **options, judge=Judge(STUDENT, PAIR))


def test_what_can_be_scored_is_and_mixtures_are_refused() -> None:
    scored = zoo.problems(2, seed=0, split="test")
    result = evaluate(STUDENT, TOKENIZER, scored, n=1, max_new_tokens=8, judge=Judge(TEACHER, PAIR), progress=False)
    assert result.reverse_kl is None and result.pass_at_1 is not None
    options = {"n": 1, "max_new_tokens": 8, "progress": False}
    with pytest.raises(ValueError, match=r"problem 1 of 12 has no answer to score against; give answers, or a judge"):
        evaluate(STUDENT, TOKENIZER, ROWS, **options)
    with pytest.raises(ValueError, match=r"d\.jsonl: problem 3 of 14 has no answer to score against; 2 others"):
        evaluate(STUDENT, TOKENIZER, [*scored, *ROWS], **options, name="d.jsonl", judge=Judge(TEACHER, PAIR))
