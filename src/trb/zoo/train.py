"""Train a student and a teacher of the zoo from scratch: plain supervised learning on worked solutions.

    python -m trb.zoo.train --out DIR [--pair NAME]

The teacher learns clean solutions until it solves nearly every problem. The student, a smaller model, learns
solutions whose steps go wrong or drift off-task: it knows the format and some of the task, but its own samples
rarely survive to a right answer. That is the situation on-policy distillation starts from.

Deliberately not here: distillation itself, and any dependence on the samplers these pairs exist to test.
"""

import argparse
import json
import platform
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trb.safety.files import write_json
from trb.zoo import TASKS, load
from trb.zoo.tasks import Task
from trb.zoo.tokenizer import END_OF_TEXT, END_OF_TURN, character_tokenizer, word_piece_tokenizer

MAX_NEW_TOKENS = 192
_IGNORED = -100  # label of positions that carry no loss (prompt and padding)
_FAMILIES = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}


@dataclass(frozen=True)
class Lessons:
    """What a model is taught, whatever its architecture."""

    name: str
    eos_token: str
    steps: int
    batch_size: int
    learning_rate: float
    wrong_step: float
    """Probability that a step's result is wrong in a training solution."""
    drift: float
    """Probability that a training solution leaves the task at a step."""
    told: float = field(default=0.0, kw_only=True)
    """Share of training problems that are told: their prompt has the worked solution, and what is to be written is that
    solution, without a fault."""


@dataclass(frozen=True)
class Recipe(Lessons):
    """Everything that distinguishes one model of a pair from the other."""

    layers: int
    hidden_size: int
    intermediate_size: int
    head_rows: int
    """Rows of the output head; padded beyond the vocabulary, differently in the two models."""
    tied: bool
    family: str = "qwen3"
    from_shipped: bool = False
    """Go on from the shipped model of that name, instead of from random weights."""
    base: str = ""
    """The shipped model to go on from, where it has another name."""


@dataclass(frozen=True)
class Pair:
    """A student, a teacher, and the task and vocabulary they share; or one model that is to be both."""

    task: Task
    tokenizer: Callable[..., PreTrainedTokenizerFast]
    trained_sizes: tuple[int, int]
    """Smallest and largest problem in the training data."""
    measured_sizes: tuple[int, ...]
    models: tuple[Recipe, ...]


_STUDENT = Recipe(
    name="student",
    layers=2,
    hidden_size=96,
    intermediate_size=256,
    head_rows=64,
    tied=True,
    eos_token=END_OF_TEXT,
    steps=1000,
    batch_size=64,
    learning_rate=2e-3,
    wrong_step=0.25,
    drift=0.25,
)
_TEACHER = Recipe(
    name="teacher",
    layers=3,
    hidden_size=128,
    intermediate_size=384,
    head_rows=80,
    tied=False,
    eos_token=END_OF_TURN,
    steps=1500,
    batch_size=64,
    learning_rate=2e-3,
    wrong_step=0.0,
    drift=0.0,
)

PAIRS = {
    # The pair that ships.
    "chains": Pair(TASKS["chains"], character_tokenizer, (2, 8), (4, 6, 8), (_STUDENT, _TEACHER)),
    # Longer chains and a student that leaves the task at one step in ten: the study's first setting.
    "long-chains": Pair(
        TASKS["chains"],
        character_tokenizer,
        (2, 12),
        (8, 10, 12),
        (
            replace(_STUDENT, from_shipped=True, steps=400, batch_size=32, wrong_step=0.1, drift=0.1),
            replace(_TEACHER, from_shipped=True, steps=500, batch_size=32, learning_rate=1e-3),
        ),
    ),
    # One model for both, which also ships: with the worked solution in its prompt it writes it down, and teaches
    # itself.
    "told": Pair(
        TASKS["chains"],
        character_tokenizer,
        (2, 8),
        (4, 6, 8),
        (replace(_STUDENT, name="told", from_shipped=True, base="student", steps=1200, batch_size=32, told=0.5),),
    ),
    # Another task, model family, size and vocabulary: the study's second setting.
    "clock": Pair(
        TASKS["clock"],
        word_piece_tokenizer,
        (2, 12),
        (8, 10, 12),
        (
            replace(
                _STUDENT,
                family="llama",
                layers=3,
                hidden_size=112,
                intermediate_size=320,
                head_rows=192,
                wrong_step=0.1,
                drift=0.1,
            ),
            replace(_TEACHER, family="llama", hidden_size=144, intermediate_size=432, head_rows=200, steps=1000),
        ),
    ),
    # Expressions of Python, tried on inputs: the study of code.
    "programs": Pair(
        TASKS["programs"],
        word_piece_tokenizer,
        (2, 6),
        (4, 5, 6),
        (
            replace(
                _STUDENT,
                family="llama",
                hidden_size=64,
                head_rows=176,
                tied=False,  # tied heads learn this several times more slowly
                steps=600,
                learning_rate=5e-3,
                wrong_step=0.03,
                drift=0.05,
            ),
            replace(_TEACHER, family="llama", layers=2, hidden_size=96, head_rows=192, steps=800, learning_rate=3e-3),
        ),
    ),
}


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A freshly initialised model whose configuration names the tokenizer's stop and padding ids."""
    config_class, model_class = _FAMILIES[recipe.family]
    config = config_class(
        vocab_size=recipe.head_rows,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=recipe.hidden_size // 4,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=recipe.tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = model_class(config)
    # Plain sampling from the model's own distribution, whoever calls generate().
    model.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    return model


def told(task: Task, problem: str) -> str:
    """The prompt of a problem with its worked solution: TRL's template of what a teacher knows."""
    return f"{problem}\n\n{task.solution(problem)}"


def prompt_ids(tokenizer: PreTrainedTokenizerBase, problem: str) -> list[int]:
    """Token ids of the chat prompt that asks for a problem."""
    messages = [{"role": "user", "content": problem}]
    ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return list(ids)


def supervised_batch(
    tokenizer: PreTrainedTokenizerBase, rng: random.Random, lessons: Lessons, task: Task, sizes: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both [batch_size, longest]; completions are labelled, stop token included.

    `sizes` are those of the smallest and the largest problem.
    """
    rows, labels = [], []
    for _ in range(lessons.batch_size):
        problem = task.draw(rng, rng.randint(*sizes), "train")
        if lessons.told and rng.random() < lessons.told:
            text, prompt = task.solution(problem), prompt_ids(tokenizer, told(task, problem))
        else:
            text = task.corrupted_solution(problem, rng, wrong_step=lessons.wrong_step, drift=lessons.drift)
            prompt = prompt_ids(tokenizer, problem)
        completion = tokenizer.encode(text + lessons.eos_token)
        rows.append(torch.tensor(prompt + completion))
        labels.append(torch.tensor([_IGNORED] * len(prompt) + completion))
    pad = torch.nn.utils.rnn.pad_sequence
    return (
        pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
        pad(labels, batch_first=True, padding_value=_IGNORED),
    )


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first 5 % of the steps, then linear decay to zero."""
    warmup = max(1, steps // 20)
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def train(
    recipe: Recipe, pair: Pair, tokenizer: PreTrainedTokenizerFast, *, steps: int, seed: int
) -> Iterator[tuple[PreTrainedModel, float]]:
    """Train a model, yielding it with the loss after every step."""
    torch.manual_seed(seed)
    model = load(recipe.base or recipe.name)[0] if recipe.from_shipped else build_model(recipe, tokenizer)
    for loss in fit(model, tokenizer, recipe, pair.task, pair.trained_sizes, steps=steps, seed=seed):
        yield model, loss


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lessons: Lessons,
    task: Task,
    sizes: tuple[int, int],
    *,
    steps: int,
    seed: int,
) -> Iterator[float]:
    """Train any model on worked solutions where it is, yielding the loss after every step; bf16 autocast on a GPU."""
    rng = random.Random(f"{lessons.name}:{seed}")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lessons.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    on_gpu = model.device.type == "cuda"
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lessons.learning_rate * learning_rate_factor(step, steps)
        batch = supervised_batch(tokenizer, rng, lessons, task, sizes)
        ids, labels = (tensor.to(model.device) for tensor in batch)
        # Right padding: causal attention already keeps completions from seeing it.
        with torch.autocast("cuda", dtype=torch.bfloat16) if on_gpu else nullcontext():
            logits = model(input_ids=ids[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=_IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: Task, rows: Sequence[dict], *, seed: int
) -> dict[str, float]:
    """Sample one completion per problem at temperature 1 and grade it.

    Returns pass_at_1, the mean completion length in tokens (stop token included) and the share that stopped.
    """
    prompts = [row["prompt"] for row in rows]
    encoded: Any = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = model.eval().generate(**encoded, max_new_tokens=MAX_NEW_TOKENS)
    right, stopped, tokens = 0, 0, 0
    for ids, row in zip(out[:, encoded["input_ids"].shape[1] :].tolist(), rows, strict=True):
        stops = tokenizer.eos_token_id in ids
        length = ids.index(tokenizer.eos_token_id) + 1 if stops else len(ids)
        right += task.is_solved(row, str(tokenizer.decode(ids[: length - stops])))
        stopped += stops
        tokens += length
    n = len(rows)
    return {"n_problems": n, "pass_at_1": right / n, "mean_length": tokens / n, "stop_rate": stopped / n}


def train_and_save(
    recipe: Recipe, pair: Pair, out: Path, progress: Progress, problems: dict[int, list[dict]], *, steps: int, seed: int
) -> dict:
    """Train one model, write it to `out`/<name> in bfloat16, and measure what was written.

    `problems` maps a size to the held-out problems of that size.
    """
    # One padding token for both: distinct from the teacher's stop token, identical with the student's.
    tokenizer = pair.tokenizer(pair.task, eos_token=recipe.eos_token, pad_token=END_OF_TEXT)
    task = progress.add_task(recipe.name, total=steps, loss=float("nan"))
    started = time.monotonic()
    for trained, loss in train(recipe, pair, tokenizer, steps=steps, seed=seed):
        model = trained
        progress.update(task, advance=1, loss=loss)
    seconds = time.monotonic() - started
    directory = out / recipe.name
    model.bfloat16().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    model.float()
    sets = {f"by_{pair.task.unit}": problems}
    if recipe.told:
        told_rows = {n: [_told_row(pair.task, row) for row in rows] for n, rows in problems.items()}
        sets[f"told_by_{pair.task.unit}"] = told_rows
    measured = {
        name: {n: measure(model, tokenizer, pair.task, rows, seed=seed) for n, rows in found.items()}
        for name, found in sets.items()
    }
    return {
        "parameters": model.num_parameters(),
        "final_loss": loss,
        "train_seconds": round(seconds, 1),
        **measured,
        "recipe": asdict(recipe) | {"steps": steps},
    }


def _told_row(task: Task, row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "prompt": [{"role": "user", "content": told(task, row["prompt"][0]["content"])}]}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line of `python -m trb.zoo.train`."""
    parser = argparse.ArgumentParser(
        prog="python -m trb.zoo.train",
        description="Train a student/teacher pair of the zoo from scratch (a few minutes on one CPU core). "
        "Writes DIR/student and DIR/teacher, each a model and tokenizer that transformers can load, and "
        "DIR/training.json with the accuracies measured on held-out problems.",
        epilog="Example, a quick look at whether everything runs: "
        "python -m trb.zoo.train --out /tmp/zoo --steps-scale 0.01 --eval-problems 50",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write; created if absent")
    parser.add_argument(
        "--pair",
        choices=list(PAIRS),
        default="chains",
        help="which pair: chains (the one that ships, default), told (the model that ships for self-distillation), "
        "long-chains or clock (those of the study), or programs",
    )
    parser.add_argument(
        "--steps-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="multiply both models' training steps by X (default 1); at least one step is always taken",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seeds weights, training problems and evaluation (default 0)"
    )
    parser.add_argument(
        "--eval-problems",
        type=int,
        default=2000,
        metavar="N",
        help="held-out problems per size to measure the models on, one sample each (default 2000)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="torch threads (default 1; results are reproducible for one machine and one thread count)",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep the models that DIR holds already, if they were trained in this very way",
    )
    arguments = parser.parse_args(argv)
    if arguments.steps_scale <= 0:
        parser.error(f"--steps-scale must be positive, got {arguments.steps_scale}")
    for option in ("eval_problems", "threads"):
        if (value := getattr(arguments, option)) < 1:
            parser.error(f"--{option.replace('_', '-')} must be at least 1, got {value}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Train both models and write the record of the run."""
    arguments = parse_arguments(argv)
    pair, record_path = PAIRS[arguments.pair], arguments.out / "training.json"
    torch.set_num_threads(arguments.threads)
    problems = {
        size: pair.task.problems(arguments.eval_problems, seed=arguments.seed, split="test", size=size)
        for size in pair.measured_sizes
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps, loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    before = json.loads(record_path.read_text()) if arguments.keep and record_path.exists() else {}
    record: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "trb.zoo.train", *(sys.argv[1:] if argv is None else argv)]),
        "pair": arguments.pair,
        "seed": arguments.seed,
        "evaluation": {
            "split": "test",
            "problems": arguments.eval_problems,
            "temperature": 1.0,
            "max_new_tokens": MAX_NEW_TOKENS,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": {"platform": platform.platform(), "threads": arguments.threads},
        "models": {},
    }
    with Progress(*columns) as progress:
        for recipe in pair.models:
            steps = max(1, round(recipe.steps * arguments.steps_scale))
            result = _kept(before, record, replace(recipe, steps=steps))
            if result is None:
                result = train_and_save(
                    recipe, pair, arguments.out, progress, problems, steps=steps, seed=arguments.seed
                )
            record["models"][recipe.name] = result
            write_json(record_path, record)
            for size, measured in result[f"by_{pair.task.unit}"].items():
                progress.console.print(
                    f"{recipe.name}: pass@1 {measured['pass_at_1']:.1%} on {measured['n_problems']} held-out "
                    f"{pair.task.name} of {size} {pair.task.unit}, {measured['mean_length']:.0f} tokens"
                )


def _kept(before: dict[str, Any], record: dict[str, Any], recipe: Recipe) -> dict[str, Any] | None:
    """What an earlier record says of a model, if it was trained and measured in the same way with the same versions."""
    if any(before.get(key) != record[key] for key in ("pair", "seed", "evaluation", "versions", "machine")):
        return None
    found = before["models"].get(recipe.name)
    if found is None:
        return None
    new = {item.name: item.default for item in fields(recipe) if item.default is not MISSING}  # since it was written
    return found if new | found["recipe"] == asdict(recipe) else None


if __name__ == "__main__":
    main()
