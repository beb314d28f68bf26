"""Evaluation: pass@1 of a model over a set of problems, with an interval that knows its samples are clustered.

pass@1 is the mean over problems of correct / n, where n completions are sampled per problem. Of problems that nothing
can be scored against, it is the reverse KL to a teacher, per token (`trb.tasks.reward_free`). Results are kept
per problem in a JSONL file as they come, and a killed run picks up where it stopped: because every draw is a
pure function of (seed, prompt, rollout index, position), the resumed run ends with exactly the same numbers. For the
same reason several processes may share the problems: each samples and scores its part, and all get every result.

Left out on purpose: comparing methods (paired intervals live in `trb.studies.statistics`), pass@k for k > 1, and the
serving engines; sampling goes through whatever `sampler` is given.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from trb.errors import InputError, did_you_mean, named
from trb.measures import OUTCOMES, PER_TOKEN, pass_at_1_interval
from trb.models.modeling import position_limit
from trb.models.tokens import check_not_empty, check_room
from trb.policies import StudentPolicy
from trb.safety.files import stable_json
from trb.sampling import NonFiniteLogitsError, Rollout, prompt_key, sample, stream_seed
from trb.tasks.conversations import conversation_of
from trb.tasks.grading import Verifier, can_be_scored
from trb.tasks.prompts import MATH_SYSTEM_PROMPT, load_prompts, render
from trb.tasks.results import Results
from trb.tasks.reward_free import TOTALS, Judge, check_units, is_reward_free, token_mean, token_totals
from trb.training.ranks import Ranks
from trb.vocab import SharedVocabulary, stop_token_ids

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "EvalResult",
    "check_problems",
    "evaluate",
    "load_benchmark",
    "longest_prompt",
]

CHUNK_ROWS = 256  # completions sampled between two saves when max_rows does not say
# Texts of more would fill a disk and no reader's day; the numbers are kept of all.
PROBLEMS_WITH_TEXTS = 2_000


@dataclass(frozen=True)
class EvalResult:
    """Result of one evaluation."""

    name: str
    pass_at_1: float | None
    """Mean over problems of correct / n; None where nothing can be scored."""
    interval: tuple[float, float]
    """95% interval of the score over problems like these; see `pass_at_1_interval`, `trb.tasks.reward_free`."""
    n_problems: int
    n_samples: int
    """Completions in all: n_problems times the samples per problem."""
    mean_length: float
    """Mean tokens per completion, the stop token included."""
    stop_rate: float
    """Share of completions that ended with a stop token rather than at max_new_tokens."""
    correct: list[int] = field(default_factory=list, repr=False)
    """How many completions of each problem were right."""
    same_as: list[int] = field(default_factory=list, repr=False)
    """Of each problem, the first one with the same prompt; empty where all prompts differ."""
    reverse_kl: float | None = None
    """In place of pass@1: KL(model || teacher), mean over the tokens of all completions, in nats."""
    student_entropy: float | None = None
    """With reverse_kl: entropy of the model, the same mean."""
    teacher_log_prob: float | None = None
    """With reverse_kl: the teacher's log-probability, the same mean."""
    values: list[float] = field(default_factory=list, repr=False)
    """With reverse_kl: the share in it of each prompt, or conversation; it is their mean."""

    @property
    def outcomes(self) -> dict[str, list[Any]]:
        """What the score is the mean of."""
        if self.reverse_kl is not None:
            return {"values": self.values}
        return {"correct": self.correct, **({"same_as": self.same_as} if self.same_as else {})}

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON types, one line of evals.jsonl without its step."""
        summary = {name: value for name, value in vars(self).items() if name not in OUTCOMES and value is not None}
        return {**summary, "interval": list(self.interval)}


@dataclass(frozen=True)
class Benchmark:
    """Where a public benchmark lives, and how many samples per problem the paper draws (section 6)."""

    hub_name: str
    """`owner/name` or `owner/name:config`."""
    split: str
    prompt_column: str
    answer_column: str
    n: int
    """Samples per problem in the paper's protocol."""
    system_prompt: str = MATH_SYSTEM_PROMPT


BENCHMARKS: Mapping[str, Benchmark] = {
    "gsm8k": Benchmark("openai/gsm8k:main", "test", "question", "answer", 32),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", "problem", "answer", 64),
    "amc": Benchmark("AI-MO/aimo-validation-amc", "train", "problem", "answer", 512),
    "olympiadbench": Benchmark("Hothan/OlympiadBench:OE_TO_maths_en_COMP", "train", "question", "final_answer", 64),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", "problem", "answer", 512),
    "aime25": Benchmark("math-ai/aime25", "test", "problem", "answer", 512),
}


def load_benchmark(name: str, path: str | Path | None = None) -> "Dataset":
    """The problems of a benchmark in `BENCHMARKS`, with the mathematics system prompt.

    Loaded from the hub, or from `path`: a local file or folder with the same columns (and, for a folder, the
    same split). Raises ValueError for an unknown name; what loading raises is that of `trb.tasks.prompts.load_prompts`.
    """
    if name not in BENCHMARKS:
        hint = did_you_mean(name, BENCHMARKS)
        raise InputError(f"unknown benchmark {name!r}; choose one of {', '.join(BENCHMARKS)}{hint}")
    benchmark = BENCHMARKS[name]
    return load_prompts(
        benchmark.hub_name if path is None else Path(path).absolute(),
        split=benchmark.split,
        system_prompt=benchmark.system_prompt,
        prompt_column=benchmark.prompt_column,
        answer_column=benchmark.answer_column,
    )


# long because its options take a line each: as parameters, as settings of the results file, and for the sampler
def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    problems: "Dataset | Sequence[Mapping[str, Any]]",
    *,
    n: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    max_rows: int | None = None,
    results_path: str | Path | None = None,
    verifier: Verifier | None = None,
    name: str = "eval",
    progress: bool = True,
    save_completions: int = 0,
    sampler: Callable[..., Any] = sample,
    ranks: Ranks | None = None,
    vocabulary: SharedVocabulary | None = None,
    judge: Judge | None = None,
    about: Mapping[str, Any] | None = None,
) -> EvalResult:
    """Sample `n` completions of every problem, score them and return pass@1 with its 95% interval.

    Args:
        model: a causal LM.
        tokenizer: the model's, with its chat template.
        problems: rows of `trb.tasks.prompts.load_prompts`, each with something to score against; or none of them, and a
            `judge` reads their completions.
        n: completions of each problem.
        max_new_tokens: the longest completion, stop token included.
        temperature: divides the logits.
        seed: of the draws, which are functions of (seed, name, prompt, rollout index, position).
        max_rows: bounds the completions in flight.
        results_path: finished problems are appended there in order (one JSON object per line under a header of
            settings), and a later call with the same settings continues the file. Of the models they have what `about`
            says: without it, use one file per model and step.
        verifier: scores completions; by default one of this call's own.
        name: of the set of problems: in the result, in errors, and in the random streams.
        progress: whether a bar is shown on the terminal's error output.
        save_completions: so many completions per problem are kept in the file as text, and the question, of the first
            2,000 problems.
        sampler: with the signature of `trb.sampling.sample`; its `settings`, if it has any, join those of the file.
        ranks: with them, every process of a launch calls this with the same arguments and a whole model: they share the
            problems, the first one keeps the file, and all return the result.
        vocabulary: that of the model's pair, whose stop ids then end a completion as they do in training; by default
            the model's own do. Either way all rows of its head take part, as in any engine that loads it, unless there
            is a judge to read them.
        judge: of problems that nothing can be scored against: the score is then the reverse KL to its teacher.
        about: settings of the file beside this call's own, as JSON types: which model it is.

    Raises:
        ValueError: a problem without an answer among others that have one, or without a judge; one that is too long for
            the model; a results file of other settings or content.
        NonFiniteLogitsError: the model's logits are NaN or infinite; names the problem.
    """
    # Another sampler may have other limits than the model's own.
    limited = model if sampler is sample else None
    rows, prompts = check_problems(
        limited, tokenizer, problems, n=n, max_new_tokens=max_new_tokens, name=name, judge=judge
    )
    judge = judge if judge is not None and is_reward_free(rows) else None
    vocabulary = vocabulary if judge is None else judge.vocabulary
    stop_ids = stop_token_ids(model, tokenizer) if vocabulary is None else vocabulary.stop_ids
    taught = _taught(judge, tokenizer, name, prompts)
    settings = {
        "name": name,
        "problems": _fingerprint(prompts, rows),
        "n_problems": len(rows),
        "n": n,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "stop_ids": stop_ids,
        **({} if judge is None else {"teacher": judge.teacher.name_or_path, "taught": _fingerprint(taught, rows)}),
        **getattr(sampler, "settings", {}),
        **(about or {}),
    }
    draw = partial(
        sampler,
        model,
        None,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids,
        temperature=temperature,
        seed=stream_seed(seed, "eval", name),
        max_rows=max_rows,
        **({} if judge is None else {"vocab_size": judge.vocabulary.size}),
    )
    totals = None if judge is None else partial(token_totals, model, judge, temperature=temperature, max_rows=max_rows)
    ranks = ranks or Ranks()
    # Between two saves every process samples `chunk` problems, the batches that one process would sample in turn.
    chunk = max(1, (max_rows or CHUNK_ROWS) // n)
    path = None if results_path is None or not ranks.is_first else Path(results_path)
    results = Results(path, settings, chunk * ranks.count, ranks)
    with ExitStack() as stack:
        scorer = stack.enter_context(Verifier()) if verifier is None else verifier
        bar = stack.enter_context(Progress(console=Console(stderr=True), disable=not (progress and ranks.is_first)))
        task = bar.add_task(name, total=len(rows), completed=len(results.records))
        sampling = _Sampling(name, rows, prompts, taught, n, draw, tokenizer, scorer, totals, save_completions)
        for start in range(len(results.records), len(rows), chunk * ranks.count):
            found = sampling.records(_share(start, len(rows), chunk, ranks))
            results.append(list(chain.from_iterable(ranks.gather(found))))
            bar.update(task, completed=len(results.records))
    return _summary(name, results.records, n, judge is None)


def check_problems(
    model: "PreTrainedModel | None",
    tokenizer: "PreTrainedTokenizerBase",
    problems: "Dataset | Sequence[Mapping[str, Any]]",
    *,
    n: int,
    max_new_tokens: int,
    name: str = "eval",
    judge: Judge | None = None,
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """The problems as plain rows, and their prompts as token ids; refuses what `evaluate` would, and samples nothing.

    `model` says how many positions there are; None for no limit.
    """
    rows = _checked_rows(problems, n, judge, name)
    prompts = render(tokenizer, rows)
    limits = {} if model is None else {f"the model ({type(model).__name__})": position_limit(model)}
    check_not_empty(list(map(len, prompts)), lambda row: f"{name}[{row}]")
    check_room(list(map(len, prompts)), name, max_new_tokens, limits, knob=named("max_new_tokens"))
    if judge is not None and is_reward_free(rows):
        check_units(rows, name)
        taught = list(map(len, _taught(judge, tokenizer, name, prompts)))
        check_not_empty(taught, lambda row: f"the teacher's prompt of {name}[{row}]")
        limits = {"the teacher": position_limit(judge.teacher)}
        check_room(taught, name, max_new_tokens, limits, knob=named("max_new_tokens"))
    return rows, prompts


def longest_prompt(tokenizer: "PreTrainedTokenizerBase", problems: Iterable[Mapping[str, Any]]) -> int:
    """Tokens of the longest prompt of some problems; 0 of none."""
    return max(map(len, render(tokenizer, problems)), default=0)


def _checked_rows(
    problems: "Dataset | Sequence[Mapping[str, Any]]", n: int, judge: Judge | None, name: str
) -> list[dict[str, Any]]:
    """The problems as plain rows: some, and each with something to score against, or none and somebody to read them."""
    if n < 1 or not len(problems):
        raise InputError(f"{name}: evaluation needs at least one problem and one sample, got {len(problems)} and n={n}")
    rows = [dict(row) for row in problems]
    missing = [index for index, row in enumerate(rows) if not can_be_scored(row)]
    if not missing or (judge is not None and len(missing) == len(rows)):
        return rows
    remedy = f"give answers, or a {named('judge')} to read completions"
    if others := len(rows) - len(missing):
        turns = f", or {named('assistant_turns')} 'last'" if any(map(conversation_of, rows)) else ""
        remedy = f"{others} others have one: keep those without an answer apart, or give it one{turns}"
    raise InputError(f"{name}: problem {missing[0] + 1} of {len(rows)} has no answer to score against; {remedy}")


def _taught(judge: Judge | None, tokenizer: Any, name: str, prompts: list[list[int]]) -> list[list[int]]:
    """The prompts as the teacher reads them."""
    if judge is None or judge.problems is None:
        return prompts
    return render(tokenizer, judge.problems[name])


def _repeated(items: Sequence[Any], n: int) -> list[Any]:
    return [item for item in items for _ in range(n)]


def _fingerprint(prompts: list[list[int]], rows: list[dict[str, Any]]) -> str:
    """A hash of everything about the problems that a score depends on."""
    digest = hashlib.sha256()
    for prompt, row in zip(prompts, rows, strict=True):
        scoring = [row.get("answer"), row.get("verifier"), row.get("metadata")]
        digest.update(stable_json([prompt, *scoring]).encode())
    return digest.hexdigest()[:16]


def _share(start: int, stop: int, chunk: int, ranks: Ranks) -> slice:
    """This process's problems of a round that begins with problem `start`: a chunk each, or equal parts of what is
    left. The first processes have the first problems."""
    size = min(chunk, math.ceil((stop - start) / ranks.count))
    first = min(stop, start + ranks.index * size)
    return slice(first, min(stop, first + size))


@dataclass(frozen=True)
class _Sampling:
    """Problems, and how any part of them is sampled and scored."""

    name: str
    rows: list[dict[str, Any]]
    prompts: list[list[int]]
    taught: list[list[int]]
    """The prompts as a judge reads them."""
    n: int
    draw: Callable[..., Rollout]
    tokenizer: "PreTrainedTokenizerBase"
    scorer: Verifier
    totals: Callable[..., list[dict[str, float]]] | None
    """Of prompts, prompts as a judge reads them and completions: sums over tokens; None without a judge."""
    save_completions: int

    def records(self, part: slice) -> list[dict[str, Any]]:
        """What is kept of each problem of a part."""
        rows, prompts, n = self.rows[part], self.prompts[part], self.n
        if not prompts:
            return []
        rollout = self._rollout(part)
        texts = self.tokenizer.batch_decode(rollout.completions, skip_special_tokens=True)
        scores = self.scorer.score(texts, _repeated(rows, n))
        found = _records(part.start, prompts, n, rollout, scores)
        if self.totals is not None:
            read = _repeated(self.taught[part], n)
            _add_totals(found, rows, self.totals(_repeated(prompts, n), read, rollout.completions), n)
        if self.save_completions:
            _add_texts(found, rows, texts, scores, self.save_completions)
        return found

    def _rollout(self, part: slice) -> Rollout:
        """`n` completions of every prompt of a part; rows of one prompt stand together."""
        prompts = _repeated(self.prompts[part], self.n)
        try:
            return self.draw(
                prompts=prompts,
                policy=StudentPolicy(),
                prompt_keys=list(map(prompt_key, prompts)),
                rollout_index=[row % self.n for row in range(len(prompts))],
            )
        except NonFiniteLogitsError as error:
            place = f"problem {part.start + error.row // self.n + 1} of {len(self.prompts)} of {self.name}"
            raise NonFiniteLogitsError("model", error.row, error.position, place) from error


def _records(
    start: int, prompts: list[list[int]], n: int, rollout: Rollout, scores: Sequence[float]
) -> list[dict[str, Any]]:
    """What is kept of each problem of a chunk that begins with problem `start`."""
    records = []
    for position, prompt in enumerate(prompts):
        part = slice(position * n, (position + 1) * n)
        records.append(
            {
                "problem": start + position,
                "prompt_hash": f"{prompt_key(prompt):016x}",
                "n": n,
                **({} if any(map(math.isnan, scores[part])) else {"correct": int(sum(scores[part]))}),
                "lengths": [len(completion) for completion in rollout.completions[part]],
                "stopped": [bool(stopped) for stopped in rollout.stopped[part]],
            }
        )
    return records


def _add_totals(
    records: list[dict[str, Any]], rows: Sequence[Mapping[str, Any]], totals: Sequence[Mapping[str, float]], n: int
) -> None:
    """Add the sums over the tokens of each problem's completions, and whose turn it is."""
    for position, (record, row) in enumerate(zip(records, rows, strict=True)):
        own = totals[position * n : (position + 1) * n]
        record |= {name: math.fsum(one[name] for one in own) for name in TOTALS}
        record["conversation"] = conversation_of(row)


def _add_texts(
    records: list[dict[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    texts: Sequence[str],
    scores: Sequence[float],
    count: int,
) -> None:
    """Add the question and the first `count` completions to the records of problems that a reader may get to see."""
    for position, (record, row) in enumerate(zip(records, rows, strict=True)):
        if record["problem"] < PROBLEMS_WITH_TEXTS:
            part = slice(position * record["n"], position * record["n"] + min(count, record["n"]))
            record["question"] = str(row["prompt"][-1]["content"])
            record["completions"] = list(texts[part])
            if "correct" in record:
                record["right"] = [bool(int(score)) for score in scores[part]]


def _summary(name: str, records: list[dict[str, Any]], n: int, has_scores: bool) -> EvalResult:
    samples = len(records) * n
    what: dict[str, Any]
    if has_scores:
        correct, prompts = ([record[key] for record in records] for key in ("correct", "prompt_hash"))
        first = {prompt: place for place, prompt in reversed([*enumerate(prompts)])}
        what = {
            "pass_at_1": sum(correct) / samples,
            "interval": pass_at_1_interval(correct, n, prompts),
            "correct": correct,
            "same_as": [] if len(first) == len(prompts) else [first[prompt] for prompt in prompts],
        }
    else:
        value, interval, values = token_mean(records)
        means = {key: token_mean(records, key)[0] for key in PER_TOKEN}
        what = {"pass_at_1": None, "reverse_kl": value, "interval": interval, "values": values, **means}
    return EvalResult(
        name=name,
        n_problems=len(records),
        n_samples=samples,
        mean_length=sum(sum(record["lengths"]) for record in records) / samples,
        stop_rate=sum(sum(record["stopped"]) for record in records) / samples,
        **what,
    )
