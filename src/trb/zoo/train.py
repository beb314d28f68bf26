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
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import MISSING, asdict, fields, replace
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
from trb.zoo import load
from trb.zoo.measuring import MAX_NEW_TOKENS, measure
from trb.zoo.pairs import PAIRS, Lessons, Pair, Recipe
from trb.zoo.tasks import Task
from trb.zoo.tokenizer import END_OF_TEXT

_IGNORED = -100  # label of positions that carry no loss (prompt and padding)
_FAMILIES = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}


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
    return chat_ids(tokenizer, [{"role": "user", "content": problem}])


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a chat that the model is to go on with."""
    ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return list(ids)


def supervised_batch(
    tokenizer: PreTrainedTokenizerBase, rng: random.Random, lessons: Lessons, task: Task, sizes: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both [batch_size, longest]; what a model writes is labelled, stop token included.

    `sizes` are those of the smallest and the largest problem.
    """
    rows, labels = [], []
    for _ in range(lessons.batch_size):
        problem = task.draw(rng, rng.randint(*sizes), "train")
        if lessons.told and rng.random() < lessons.told:
            text, messages = task.solution(problem), [{"role": "user", "content": told(task, problem)}]
        else:
            messages, text = task.lesson(problem, rng, wrong_step=lessons.wrong_step, drift=lessons.drift)
        prompt = chat_ids(tokenizer, messages)
        completion, own = encoded_turns(tokenizer, task, text + lessons.eos_token)
        rows.append(torch.tensor(prompt + completion))
        learnt = [token if ours else _IGNORED for token, ours in zip(completion, own, strict=True)]
        labels.append(torch.tensor([_IGNORED] * len(prompt) + learnt))
    pad = torch.nn.utils.rnn.pad_sequence
    return (
        pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
        pad(labels, batch_first=True, padding_value=_IGNORED),
    )


def encoded_turns(tokenizer: PreTrainedTokenizerBase, task: Task, text: str) -> tuple[list[int], list[bool]]:
    """Token ids of a solution, and which of them are the model's own."""
    ids, own = list[int](), list[bool]()
    for place, piece in enumerate(task.given.split(text) if task.given else [text]):
        part = tokenizer.encode(piece)
        ids += part
        own += [place % 2 == 0] * len(part)  # what the pattern finds stands at the odd places
    return ids, own


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
        name: {
            n: measure(model, tokenizer, pair.task, rows, seed=seed, max_new_tokens=MAX_NEW_TOKENS)
            for n, rows in found.items()
        }
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
        "caller (the pair that ships for tools), long-chains or clock (those of the study), programs, or dialogue",
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
    if not 0 <= arguments.seed < 1 << 32:
        parser.error(f"--seed must lie in [0, 2**32), got {arguments.seed}")
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
