"""The zoo's tokenizers: one token per character, or pieces of words learned from a task's solutions.

Student and teacher of a pair share the vocabulary token for token; they differ only in which token ends a completion,
as base and chat models of one family do. Characters outside the vocabulary become `<unk>`.
"""

import random
import re
from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trb.zoo.tasks import Task

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|im_end|>"
_SPECIAL = (END_OF_TEXT, "<|im_start|>", END_OF_TURN, "<unk>")
_WORDS = ("\\boxed{", "assistant", "system", "user")
_CHARACTERS = "0123456789+-=() \n.,:?#}abcdefghijklmnopqrstuvwxyz"

_WORD_PIECES = 160

VOCABULARY = {token: index for index, token in enumerate((*_SPECIAL, *_WORDS, *_CHARACTERS))}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_CALLING_WORDS = ("<tool_call>", "</tool_call>", "tool", "calculator", "expression")
_CALLING_CHARACTERS = "*/{'"

CALLING_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}<tool_call>{{ call['function']['name'] }}("
    "{% for name, value in call['function']['arguments'].items() %}{{ name }}={{ value }}{% endfor %}"
    ")</tool_call>{% endfor %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open_pattern": r"<tool_call>(?P<name>\w+)\(expression=",
            "close_pattern": r"\)</tool_call>",
            "repeats": True,
            "content": "text",
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": {"expression": "{content}"}},
            },
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


def character_tokenizer(task: Task, *, eos_token: str, pad_token: str) -> PreTrainedTokenizerFast:
    """One token per character and a few whole words; the same for every task.

    `eos_token` and `pad_token` are special tokens of the vocabulary.
    """
    return _wrapped(_by_character(VOCABULARY, _WORDS), eos_token, pad_token)


def calling_tokenizer(task: Task, *, eos_token: str, pad_token: str) -> PreTrainedTokenizerFast:
    """`character_tokenizer` for models that call a calculator; it says how a call is read out of what they write."""
    words = (*_WORDS, *_CALLING_WORDS)
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *words, *_CHARACTERS, *_CALLING_CHARACTERS))}
    tokenizer = _wrapped(_by_character(vocabulary, words), eos_token, pad_token)
    tokenizer.chat_template = CALLING_TEMPLATE
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer


def _by_character(vocabulary: dict[str, int], words: Sequence[str]) -> Tokenizer:
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pieces = "|".join([*map(re.escape, words), r"[\s\S]"])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return backend


def word_piece_tokenizer(task: Task, *, eos_token: str, pad_token: str) -> PreTrainedTokenizerFast:
    """Byte-pair encoding learned from a thousand noisy solutions of the task, always the same ones.

    `eos_token` and `pad_token` are special tokens of the vocabulary.
    """
    rng, sizes = random.Random("word pieces"), range(task.smallest, 2 * task.default)
    corpus = []
    for _ in range(1000):
        problem = task.draw(rng, rng.choice(sizes), "train")
        corpus += [problem, task.corrupted_solution(problem, rng, wrong_step=0.1, drift=0.1)]
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # The alphabet of the character tokenizer in ByteLevel's spelling, whether or not the corpus has every letter.
    alphabet = [spelled for spelled, _ in (backend.pre_tokenizer.pre_tokenize_str(c)[0] for c in _CHARACTERS)]
    trainer = trainers.BpeTrainer(
        vocab_size=_WORD_PIECES, special_tokens=list(_SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    backend.add_tokens([AddedToken(word, normalized=False) for word in _WORDS])
    return _wrapped(backend, eos_token, pad_token)


def _wrapped(backend: Tokenizer, eos_token: str, pad_token: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos_token,
        pad_token=pad_token,
        unk_token="<unk>",
        additional_special_tokens=list(_SPECIAL[:3]),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
