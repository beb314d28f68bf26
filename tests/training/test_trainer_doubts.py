"""What is probably not meant is warned about once where a trainer starts, as `trb train` warns of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_runs import build

from trb import zoo
from trb.training import doubts

LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
# What nothing is said of.
PLAIN = {"max_steps": 1, "blend_warmup_steps": 1, "max_completion_length": 4, "train_rows": zoo.problems(8, seed=0)}


def said(trainer: Any, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    trainer.train()
    return [record.message for record in caplog.records if record.name == doubts.__name__]


def strange(character: str) -> list[dict[str, Any]]:
    rows = zoo.problems(8, seed=0)
    return [{"prompt": [{"role": "user", "content": f"1+1+{character}"}]}, *rows[1:]]


def models(role: str) -> Any:
    return zoo.load(role)[0]


def adapted(role: str, *, trained: bool = False) -> Any:
    model = get_peft_model(models(role), LORA)
    if trained:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.add_(0.1)
    return model


DOUBTS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "a budget of another schedule": (
        {"budget_schedule": "sequence", "initial_kl_budget": 0.3, "blend_warmup_steps": None},
        "initial_kl_budget: 0.3, which budget_schedule=sequence does not read",
        {"budget_schedule": "sequence", "initial_kl_budget": None, "blend_warmup_steps": None},
    ),
    "K of another schedule": (
        {"budget_schedule": "gap", "initial_kl_budget": 0.3, "blend_warmup_steps": 1},
        "blend_warmup_steps: 1, which budget_schedule=gap does not read",
        {"budget_schedule": "gap", "initial_kl_budget": 0.3, "blend_warmup_steps": None},
    ),
    "a knob of another loss": (
        {"veto_strength": 0.9},
        "veto_strength: 0.9, which behavior=trust_region with loss=reverse_kl does not read. Leave it out, or choose "
        "what does: method: veto; loss: veto",
        {"veto_strength": 0.9, "loss": "veto", "veto_steps": 1},
    ),
    "a budget without blending": (
        {"method": "opd", "blend_warmup_steps": None},
        "initial_kl_budget: 0.5, which behavior=student with loss=reverse_kl does not read. Leave it out, or choose "
        "what does: method: fixed, share; behavior: fixed_budget; behavior: annealed_share; budget_schedule: linear",
        {"method": "opd", "initial_kl_budget": None, "blend_warmup_steps": None},
    ),
    "a schedule without a budget": (
        {"method": "opd", "initial_kl_budget": None, "blend_warmup_steps": None, "budget_schedule": "gap"},
        "budget_schedule: gap, which behavior=student with loss=reverse_kl does not read. Leave it out, or choose "
        "what does: method: trb; behavior: trust_region",
        {"method": "opd", "initial_kl_budget": None, "blend_warmup_steps": None, "budget_schedule": "linear"},
    ),
    "K beyond the end": ({"blend_warmup_steps": 2}, "blend_warmup_steps: 2 steps, and the run has 1", {}),
    "K beyond the epochs": (
        {"max_steps": -1, "num_train_epochs": 0.5, "blend_warmup_steps": 3},
        "blend_warmup_steps: 3 steps, and the run has 2",
        {"max_steps": -1, "num_train_epochs": 0.5, "blend_warmup_steps": 2},
    ),
    "swapped": (
        {"student": "teacher", "teacher": "student"},
        "sizes: the student has 0.61 million parameters, more than the teacher's 0.21 million. Exchange student and "
        "teacher if they were swapped",
        {},
    ),
    "infinite budget": ({"initial_kl_budget": float("inf")}, "initial_kl_budget: infinite", {"initial_kl_budget": 5.0}),
    "same weights": ({"teacher": "student"}, "weights: student and teacher are the same model", {}),
    "same weights, with an adapter to train": (
        {"teacher": "student", "peft_config": LORA},
        "weights: student and teacher are the same model",
        {"peft_config": LORA},
    ),
    "the same weights with a fresh adapter": (
        {"teacher": "student", "student": lambda: adapted("student")},
        "weights: student and teacher are the same model",
        {"teacher": "student", "student": lambda: adapted("student", trained=True)},
    ),
    "unknown characters": (
        {"train_rows": strange("\N{LATIN SMALL LETTER E WITH ACUTE}")},
        "prompts: 1 of 8 have characters that the tokenizer does not know, the first in row 1",
        {"train_rows": strange("1")},
    ),
    "chats rendered already": (
        {"train_rows": [*zoo.problems(7, seed=0), {"prompt": [{"role": "user", "content": "<|im_start|>user\n1+1"}]}]},
        "prompts: 1 of 8 are whole chats, rendered already, the first in row 8",
        {},
    ),
    "learning rate": ({"learning_rate": 4e-3}, "learning_rate: 0.004, more than 10 times the 0.0003", {}),
    "learning rate of adapters": (
        {"learning_rate": 4e-2, "peft_config": LORA},
        "learning_rate: 0.04, more than 10 times the 0.003",
        {"learning_rate": 4e-3, "peft_config": LORA},
    ),
    "learning rate of another optimizer": (
        {"learning_rate": 0.1},
        "learning_rate: 0.1",
        {"learning_rate": 0.1, "optim": "sgd"},
    ),
}


def test_a_doubt_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = built(tmp_path, DOUBTS["K beyond the end"][0])
    assert len(said(trainer, caplog)) == 1
    assert said(trainer, caplog) == []  # `train` once more


@pytest.mark.parametrize("name", DOUBTS)
def test_a_doubt_is_said_and_not_where_it_is_unfounded(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrong, text, right = DOUBTS[name]
    [line] = said(built(tmp_path, wrong), caplog)
    assert line.startswith(text)
    assert said(built(tmp_path, right), caplog) == []


def built(directory: Path, changes: dict[str, Any]) -> Any:
    changes = {**PLAIN, **changes}
    for role in ("student", "teacher"):
        chosen = changes.get(role)
        changes[role] = models(chosen) if isinstance(chosen, str) else chosen() if chosen else None
    return build(directory, **changes)


def test_two_templates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = built(tmp_path, {})
    trainer.teachers[0].tokenizer.chat_template = "{{ messages[-1]['content'] }}="
    [line] = said(trainer, caplog)
    assert line.startswith("chat template: student and teacher write one conversation differently: '<|im_start|>")
    assert "processing_class.chat_template = teacher_processing_class.chat_template writes the teacher's way" in line


def test_a_chat_rendered_already_is_trained_on_as_it_is(tmp_path: Path) -> None:
    rows = zoo.problems(4, seed=0)
    trainer = built(tmp_path, {})
    messages = [row["prompt"] for row in rows]
    texts = [
        trainer._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in messages
    ]
    mixed = [[{"role": "user", "content": texts[0]}], messages[1], [{"role": "user", "content": texts[2]}], messages[3]]
    expected = trainer._tokenize_prompts(messages)[0]
    assert trainer._tokenize_prompts(mixed)[0] == expected
    assert trainer._tokenize_prompts(mixed[:1])[0] == expected[:1]
