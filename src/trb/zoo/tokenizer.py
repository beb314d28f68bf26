"""The zoo's tokenizer: one token per character, plus a few whole words of the chat format.

Student and teacher share the vocabulary token for token; they differ only in which token ends a completion,
as base and chat models of one family do. Characters outside the vocabulary become `<unk>`.
"""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|im_end|>"
_SPECIAL = (END_OF_TEXT, "<|im_start|>", END_OF_TURN, "<unk>")
_WORDS = ("\\boxed{", "assistant", "system", "user")
_CHARACTERS = "0123456789+-=() \n.,:?#}abcdefghijklmnopqrstuvwxyz"

VOCABULARY = {token: index for index, token in enumerate((*_SPECIAL, *_WORDS, *_CHARACTERS))}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(*, eos_token: str, pad_token: str) -> PreTrainedTokenizerFast:
    """The shared vocabulary with the given end-of-sequence and padding tokens (both special tokens of it)."""
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    pieces = "|".join([r"\\boxed\{", *_WORDS[1:], r"[\s\S]"])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    backend.decoder = decoders.Fuse()
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
