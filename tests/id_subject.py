"""A subject whose prompts are written as token ids, for diagnostics that grade nothing."""

import copy

from conftest import TinyPair

from trb.studies.subject import Subject

PROMPTS = [[1], [2, 3, 1], [3, 5, 2, 2, 1], [5, 1]]


class Ids:
    """Prompts are written as their ids; nothing is graded."""

    chat_template = name_or_path = "ids"
    bos_token = None
    added_tokens_decoder: dict[int, str] = {}  # noqa: RUF012

    def __init__(self, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(6)}

    def apply_chat_template(self, messages, **options) -> list[int]:
        return [int(token) for token in messages[0]["content"].split()]

    def batch_decode(self, rows, skip_special_tokens=False) -> list[str]:
        return ["" for _ in rows]

    def score(self, completions, rows) -> list[float]:
        return [0.0 for _ in rows]


def id_subject(tiny_pair: TinyPair) -> Subject:
    """The tiny pair on the prompts above, its student with gradients."""
    student = copy.deepcopy(tiny_pair.student).requires_grad_(True)
    tokenizer = Ids(tiny_pair.student_eos)
    rows = [{"prompt": [{"role": "user", "content": " ".join(map(str, ids))}], "answer": "0"} for ids in PROMPTS]
    return Subject(
        student,
        tiny_pair.teacher,
        tokenizer,
        rows,
        tokenizer,
        samples=20,  # 40 rows a half: more than are read at once
        max_new_tokens=5,
        seed=3,
        teacher_tokenizer=Ids(tiny_pair.teacher_eos),
    )
