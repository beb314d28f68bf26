"""What the models of a pair can do: one sampled completion per problem, graded, with as many turns as the task has.

Only for the script that trains the pairs. Deliberately not here: the package's samplers, which the pairs exist to test.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trb.zoo.tasks import Task

MAX_NEW_TOKENS = 192
_MOST_TURNS = 8


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[dict],
    *,
    seed: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> dict[str, float]:
    """Sample one completion per problem at temperature 1 and grade it.

    Returns pass_at_1, the mean completion length in tokens (stop tokens included, answers of tools not) and the share
    whose last turn stopped. `max_new_tokens` are those of a turn.
    """
    chats = [
        str(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)) for row in rows
    ]
    written, lengths, stopped = [""] * len(rows), [0] * len(rows), [False] * len(rows)
    going = list(range(len(rows)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(_MOST_TURNS):
            turns = _next_turns(model, tokenizer, [chats[row] for row in going], max_new_tokens)
            asking = []
            for row, (text, tokens, stops) in zip(going, turns, strict=True):
                written[row] += text
                lengths[row] += tokens
                stopped[row] = stops
                answer = task.answer_to_call(text) if stops else None
                if answer is not None:
                    chats[row] += text + str(tokenizer.eos_token) + answer
                    asking.append(row)
            going = asking
            if not going:
                break
    n = len(rows)
    right = sum(task.is_solved(row, text) for row, text in zip(rows, written, strict=True))
    return {
        "n_problems": n,
        "pass_at_1": right / n,
        "mean_length": sum(lengths) / n,
        "stop_rate": sum(stopped) / n,
    }


def _next_turns(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: list[str], max_new_tokens: int
) -> list[tuple[str, int, bool]]:
    """Of each chat what follows without its stop token, how many tokens that is with it, and whether it stopped."""
    encoded: Any = tokenizer(chats, add_special_tokens=False, padding=True, return_tensors="pt")
    out = model.eval().generate(**encoded, max_new_tokens=max_new_tokens)
    found = []
    for ids in out[:, encoded["input_ids"].shape[1] :].tolist():
        stops = tokenizer.eos_token_id in ids
        length = ids.index(tokenizer.eos_token_id) + 1 if stops else len(ids)
        found.append((str(tokenizer.decode(ids[: length - stops])), length, stops))
    return found
