"""The pair the benchmarks run on: SmolLM2-135M-Instruct as teacher, its copy pruned to 8 of 30 layers as student.

The pruned copy alone never stops a completion, so it is trained for a short while on the teacher's own completions
first (supervised, fixed seed). The result is kept in the cache directory of trb; `smollm2_pair` makes it if needed,
which takes a few minutes on two cores.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trb.losses import chunked_reverse_kl
from trb.models.loading import load_model, load_tokenizer
from trb.models.modeling import OutputHead, completion_hidden_states
from trb.models.pruning import prune_depth
from trb.policies import StudentPolicy
from trb.safety.files import cache_directory
from trb.sampling import sample
from trb.vocab import SharedVocabulary, head_rows

TEACHER = "smollm2-135m"
LAYERS = 8
STOP = 2  # <|im_end|>
NEVER, NEVER_ID = "<|im_start|>", 1  # as a stop token next to impossible: every completion has the same length
# How the student is trained: teacher completions, passes over them, batch, rate, longest completion, seed.
HEALING = {"completions": 512, "epochs": 8, "batch": 32, "learning_rate": 1e-3, "tokens": 64, "seed": 1}


def questions(count: int, seed: int) -> list[dict[str, Any]]:
    """Arithmetic questions; the teacher answers in 15 to 40 tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for first, second, third in torch.randint(2, 60, (count, 3), generator=generator).tolist():
        text = f"What is {first} + {second} - {third}? Answer in one short sentence."
        rows.append({"prompt": [{"role": "user", "content": text}]})
    return rows


def prompts(tokenizer: PreTrainedTokenizerBase, count: int, rollouts: int, seed: int) -> list[list[int]]:
    """`count` prompts of token ids, each repeated `rollouts` times."""
    rows = questions(count, seed)
    chats = [tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True, return_dict=False) for r in rows]
    return [list(chat) for chat in chats for _ in range(rollouts)]


def smollm2_pair(heal: bool = True) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Student in float32 (master weights), teacher in bfloat16, and their tokenizer; unhealed, as it was cut."""
    teacher, tokenizer = load_model(TEACHER, dtype="bfloat16").eval(), load_tokenizer(TEACHER)
    if not heal:
        return prune_depth(load_model(TEACHER, dtype="float32"), LAYERS), teacher, tokenizer
    key = "-".join(str(value) for value in (LAYERS, *HEALING.values()))
    directory = cache_directory() / "bench" / f"smollm2-{key}"
    if not (directory / "config.json").exists():
        _heal(teacher, tokenizer, directory)
    return load_model(str(directory), dtype="float32"), teacher, tokenizer


def _heal(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    print(f"training the pruned student on the teacher's completions, once, into {directory}", flush=True)
    student = prune_depth(load_model(TEACHER, dtype="float32"), LAYERS)
    rows = prompts(tokenizer, HEALING["completions"], 1, HEALING["seed"])
    options = {"max_new_tokens": HEALING["tokens"], "eos_token_id": STOP, "seed": HEALING["seed"], "max_rows": 64}
    completions = sample(teacher, None, rows, StudentPolicy(), **options).completions
    optimizer = torch.optim.AdamW(student.parameters(), lr=HEALING["learning_rate"], weight_decay=0.01)
    steps = HEALING["epochs"] * len(rows) // HEALING["batch"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, HEALING["learning_rate"], total_steps=steps)
    generator = torch.Generator().manual_seed(HEALING["seed"])
    for step in range(steps):
        chosen = torch.randperm(len(rows), generator=generator)[: HEALING["batch"]].tolist()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = distillation_loss(student, teacher, [rows[i] for i in chosen], [completions[i] for i in chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        print(f"step {step + 1}/{steps} loss {loss.item():.3f}", flush=True)
    part = directory.with_name(directory.name + ".part")
    student.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(directory)


def distillation_loss(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: list[list[int]], completions: list[list[int]]
) -> torch.Tensor:
    """Token mean of the reverse KL over the whole vocabulary."""
    longest = max(len(row) + len(completion) for row, completion in zip(rows, completions, strict=True))
    ids, mask, predicted = torch.zeros(3, len(rows), longest, dtype=torch.long)
    for index, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        length = len(row) + len(completion)
        ids[index, :length] = torch.tensor(row + completion)
        mask[index, :length] = 1
        predicted[index, len(row) : length] = 1
    hidden = completion_hidden_states(student, ids, mask, predicted)
    with torch.no_grad():
        taught = completion_hidden_states(teacher, ids, mask, predicted)
    tokens = ids[predicted.bool()]
    heads = OutputHead.of(student), OutputHead.of(teacher)
    vocabulary = SharedVocabulary.of([head_rows(student), head_rows(teacher)], STOP)
    return chunked_reverse_kl(hidden, taught, *heads, tokens, torch.ones_like(tokens), k=0, vocabulary=vocabulary)[0]


if __name__ == "__main__":
    smollm2_pair()
