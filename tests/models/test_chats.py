"""Chats rendered already are read as they are; two templates are compared by what they write."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as Bytes
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from trb.errors import InputError
from trb.models.chats import first_difference, rendered_text
from trb.tasks.prompts import load_prompts, render

# (template, special tokens, BOS) as families of models have them.
FAMILIES: dict[str, tuple[str, list[str], str | None]] = {
    "ChatML": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
        None,
    ),
    "Qwen2, with a system prompt of its own": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
        None,
    ),
    "Llama 3": (
        "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}",
        ["<s>", "<|start|>", "<|end|>", "<|eot|>"],
        "<s>",
    ),
    "Mistral": ("{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}", ["<s>"], "<s>"),
    "Zephyr, without special tokens": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        [],
        None,
    ),
}


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """One token per byte, which puts its BOS before every text as Llama's does."""
    template, special, bos = FAMILIES[family]
    backend = Tokenizer(BPE({byte: index for index, byte in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), Bytes()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    options: dict[str, Any] = {} if bos is None else {"bos_token": bos}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **options)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rendered_chat_is_not_rendered_again(family: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(family)
    text = tokenizer.apply_chat_template(user("Why?"), tokenize=False, add_generation_prompt=True)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("Why?", text)))
    rows = load_prompts(tmp_path / "rows.jsonl")
    once, again = render(tokenizer, rows)
    assert again == once
    assert tokenizer.decode(again) == text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["Why?", "user: why?", "assistant\nwhy", "What does [INST] mean?", "<|", "", " <s>"])
def test_a_question_is_rendered(family: str, text: str) -> None:
    assert rendered_text(tokenizer_of(family), user(text)) is None


def test_a_chat_with_another_system_prompt_is_known_by_its_first_turn() -> None:
    tokenizer = tokenizer_of("Qwen2, with a system prompt of its own")
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert rendered_text(tokenizer, user(text)) == text


def test_a_rendered_chat_takes_no_system_prompt() -> None:
    tokenizer = tokenizer_of("ChatML")
    text = tokenizer.apply_chat_template(user("Why?"), tokenize=False, add_generation_prompt=True)
    with pytest.raises(InputError, match=r"begins with '<\|im_start\|>user.*rendered already"):
        render(tokenizer, [{"prompt": [{"role": "system", "content": "Be brief."}, *user(text)]}])


def test_a_template_set_anew_is_asked_anew() -> None:
    tokenizer, other = tokenizer_of("Zephyr, without special tokens"), tokenizer_of("Mistral")
    text = tokenizer.apply_chat_template(user("Why?"), tokenize=False, add_generation_prompt=True)
    assert rendered_text(tokenizer, user(text)) == text
    tokenizer.chat_template = other.chat_template
    assert rendered_text(tokenizer, user(text)) is None


def test_the_first_difference_of_two_templates() -> None:
    plain, kind = tokenizer_of("ChatML"), tokenizer_of("Qwen2, with a system prompt of its own")
    found = first_difference(plain, kind, [user("Why?")])
    assert found is not None
    assert found.student.startswith("<|im_start|>user\nWhy?")
    assert found.teacher.startswith("<|im_start|>system\nBe kind.")
    # With a system prompt in the conversation the two write the same.
    assert first_difference(plain, kind, [[{"role": "system", "content": "Be brief."}, *user("Why?")]]) is None


def test_templates_that_are_not_the_same_text_may_write_the_same() -> None:
    one, other = tokenizer_of("ChatML"), tokenizer_of("ChatML")
    other.chat_template = "{# a comment #}" + str(other.chat_template)
    assert first_difference(one, other, [user("Why?")]) is None


def test_a_template_that_only_adds_differs_at_its_end() -> None:
    one, other = tokenizer_of("ChatML"), tokenizer_of("ChatML")
    other.chat_template = str(other.chat_template) + "<think>"
    found = first_difference(one, other, [user("Why?")])
    assert found is not None and found.teacher == found.student + "<think>"


def test_a_conversation_that_a_template_refuses_is_passed_over() -> None:
    one, other = tokenizer_of("ChatML"), tokenizer_of("ChatML")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    other.chat_template = refusing + str(other.chat_template)
    assert first_difference(one, other, [[{"role": "system", "content": "Be brief."}, *user("Why?")]]) is None


@pytest.mark.parametrize("role", [0, 1])
def test_a_tokenizer_without_a_template_differs_in_nothing(role: int) -> None:
    pair = [tokenizer_of("ChatML"), tokenizer_of("Mistral")]
    pair[role].chat_template = None
    assert first_difference(*pair, [user("Why?")]) is None
