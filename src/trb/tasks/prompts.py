"""Prompts: where they come from, and how they become token ids.

Every source ends as one `datasets.Dataset` with the columns `prompt` (a list of `{"role", "content"}`
messages that ends before the assistant speaks), `answer` (str, empty where there is none), `verifier`
(one of `trb.tasks.grading.VERIFIERS`) and `metadata` (a JSON object as text); and, where the teacher is to read another
prompt (`trb.training.privileged`), with `teacher_prompt` (messages) or `privileged_context` (text).

Left out on purpose: shuffling, repeating a prompt for several rollouts and padding belong to the trainer; deciding
whether an answer is right belongs to `trb.tasks.grading`. Nothing here touches the network unless the specification is
a hub name, and a folder is read without leaving it, whatever its card, its links or its columns say.
"""

import json
import logging
import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trb.errors import InputError, named, nearest
from trb.models.chats import rendered_ids
from trb.models.tokens import check_not_empty, token_ids
from trb.safety.templates import check_chat_template
from trb.safety.untrusted import check_text
from trb.tasks.answers import Row, last_boxed, reference_answer
from trb.tasks.coding import PYTHON, has_tests, program_row, test_columns
from trb.tasks.conversations import Message, check_choice, read_messages, turns_of, with_system
from trb.tasks.grading import check_verifier
from trb.tasks.gym import reasoning_gym_rows
from trb.tasks.sources import GENERATED_ROWS, GENERATORS, ZOO, kind, open_table, refuse, zoo_rows
from trb.training.privileged import CONTEXT as PRIVILEGED_CONTEXT
from trb.training.privileged import WHOLE as TEACHER_PROMPT
from trb.training.routes import Routes

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["MATH_SYSTEM_PROMPT", "OVERLONG", "check_lengths", "load_prompts", "render"]

logger = logging.getLogger(__name__)

MATH_SYSTEM_PROMPT = "Reason step by step, and put the final answer in \\boxed{}."

PROMPT_COLUMNS = ("prompt", "question", "problem", "messages", "conversations", "instruction")
PROGRAM_PROMPT_COLUMNS = ("prompt", "text")  # of problems with tests

ANSWER_COLUMNS = ("answer", "final_answer", "expected_answer", "ground_truth", "solution")

_NO_VERIFIER = (None, "")  # in a row that leaves it to the default, while others of its source name one

OVERLONG = 'overlong="drop"'


def load_prompts(
    spec: str | Path,
    *,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    system_prompt: str | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    privileged_column: str | None = None,
    assistant_turns: str | None = None,
    routes: Routes | None = None,
    revision: str | None = None,
) -> "Dataset":
    """Load prompts from a file, a local dataset folder, a task generator or the hub.

    `spec` is one of:

    - `zoo:chains`, the task of the embedded model pair (`zoo:chains?operands=8` for longer ones), or `zoo:clock`;
    - `reasoning-gym:TASK` or `reasoning-gym:TASK?key=value&key=value` (settings of that task);
    - a path ending in .jsonl, .json or .parquet: always a file, never a hub name;
    - an existing local folder (parquet or JSONL files, or one written by `Dataset.save_to_disk`);
    - anything else: a hub name, `owner/name` or `owner/name:config` (the only case that uses the network).

    `split` selects a split of a folder or hub dataset; those of a generated source are "train" and "test", which share
    no problem, whatever their seeds; a single file is one split, and read whole. `limit` keeps that many rows: a
    random subset drawn with `seed`, in source order (hub datasets are often sorted by topic); of a generated source,
    the number generated (1000 by default). `system_prompt` replaces the row's own. Columns are guessed from common
    names unless given.
    `assistant_turns` says that rows are whole conversations, and makes prompts of their turns (`all` of the
    assistant's, or the `last`), each with its conversation in `metadata`; `limit` counts conversations then.
    An assistant turn at the end is not part of the prompt; where there is no answer column, the answer is the
    last \\boxed{} of that turn. Rows without an answer get `answer == ""`: good to train on, not to score.
    A row that names its `verifier` (as in this function's own output, saved) keeps it and its `metadata`. Of the
    others, a problem with tests of its program, in the columns of MBPP or HumanEval, gets the verifier "python"
    (`trb.tasks.coding`), and any other "math"; one source may have all kinds.
    `teacher_prompt` and `privileged_context` are kept for the teacher, and `privileged_column` names another column
    that becomes the latter (of `zoo:` sources `solution` or `answer`, of `reasoning-gym:` ones `answer`).
    `routes` keeps the column that names each row's teacher, of several, as it stands, and checks it.
    A few reasoning-gym tasks (word_ladder, ransom_note, ...) draw from sets, and repeat themselves in another
    process only under the same PYTHONHASHSEED; save such rows to a file to share them.

    Raises ValueError (FileNotFoundError for a missing file, ImportError for a missing extra) naming the
    offending row, column or name and the remedy. Rows and lines are counted from 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"{named('limit')} is {limit}; give a positive number of rows, or None for all")
    check_choice(assistant_turns)
    check_text(system_prompt or "", named("system_prompt"))
    name = str(spec)
    if name.startswith(GENERATORS):
        refuse(name, revision=revision, prompt_column=prompt_column, answer_column=answer_column)
        generate = zoo_rows if name.startswith(ZOO) else reasoning_gym_rows
        found = generate(name, split, limit or GENERATED_ROWS, seed)
        rows = [own for row in found for own in _generated(row, privileged_column, assistant_turns, routes, name)]
    else:
        table = open_table(name, split, revision)
        if table.n_rows == 0:
            raise InputError(f"{name} is empty: it has no rows")
        columns = _choose_columns(name, table.columns, prompt_column, answer_column, privileged_column, routes)
        indices = _subset(table.n_rows, limit, seed)
        rows = [
            own
            for index, raw in zip(indices, table.take(indices, columns.used()), strict=True)
            for own in _rows(raw, columns.of(raw), assistant_turns, f"row {index + 1} of {name}")
        ]
    if system_prompt is not None:
        read = [name for name in ("prompt", TEACHER_PROMPT) if rows and name in rows[0]]
        rows = [row | {name: with_system(row[name], system_prompt) for name in read} for row in rows]
    dataset = _to_dataset(rows, routes)
    dataset.info.dataset_name = Path(name).name if Path(name).exists() else name  # for model cards
    return dataset


def render(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Iterable[Mapping[str, Any]],
    *,
    plain: bool = False,
    **chat_template_kwargs: Any,
) -> list[list[int]]:
    """Turn each row's `prompt` into token ids with the tokenizer's chat template and generation prompt.

    `plain=True` ignores the template: the messages' contents joined by blank lines, for base models that
    have none. `chat_template_kwargs` go to the template (for example `enable_thinking=False`). A prompt that is a
    rendered chat already (`trb.models.chats`) is not rendered again.
    Raises ValueError if the tokenizer has no chat template and `plain` is not set.
    """
    if plain:
        if chat_template_kwargs:
            raise InputError(f"{named('plain=True')} uses no chat template; remove {sorted(chat_template_kwargs)}")
        texts = ("\n\n".join(message["content"] for message in row["prompt"]) for row in rows)
        return [token_ids(tokenizer, text) for text in texts]
    if not tokenizer.chat_template and "chat_template" not in chat_template_kwargs:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; set {named('tokenizer.chat_template')} "
            f"(for instance to that of the instruct model), or {named('plain=True')} to join messages by blank lines"
        )
    if "chat_template" in chat_template_kwargs:
        check_chat_template(chat_template_kwargs["chat_template"], "the argument chat_template")
    options = chat_template_kwargs | {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    return [_rendered(tokenizer, row["prompt"], options) for row in rows]


def _rendered(tokenizer: "PreTrainedTokenizerBase", messages: list[Message], options: dict[str, Any]) -> list[int]:
    ids: Any = rendered_ids(tokenizer, messages) or tokenizer.apply_chat_template(messages, **options)
    return list(ids)


def check_lengths(
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    max_prompt_length: int,
    overlong: str = "error",
    *,
    plain: bool = False,
    **chat_template_kwargs: Any,
) -> "Dataset":
    """Return `dataset` without prompts of more than `max_prompt_length` tokens, or refuse it.

    `overlong="error"` raises ValueError for the first such row; `"drop"` removes them and logs how many. Prompts of no
    token are always refused.
    Lengths are those of `render` with the same `plain` and template arguments.
    """
    if overlong not in ("error", "drop"):
        raise InputError(f'overlong is {overlong!r}; use "error" or "drop"')
    lengths = [len(ids) for ids in render(tokenizer, dataset, plain=plain, **chat_template_kwargs)]
    check_not_empty(lengths, lambda row: f"row {row + 1}")
    kept = [index for index, length in enumerate(lengths) if length <= max_prompt_length]
    dropped = len(lengths) - len(kept)
    if dropped == 0:
        return dataset
    if overlong == "error" or not kept:
        row = next(index for index, length in enumerate(lengths) if length > max_prompt_length)
        remedy = "" if overlong == "drop" else f", or drop such rows with {named(OVERLONG)}"
        raise InputError(
            f"the prompt of row {row + 1} has {lengths[row]} tokens, more than the limit of "
            f"{max_prompt_length} ({dropped} of {len(lengths)} rows are); raise max_prompt_length{remedy}"
        )
    logger.warning("dropped %d of %d prompts over %d tokens", dropped, len(lengths), max_prompt_length)
    return dataset.select(kept)


def _subset(n_rows: int, limit: int | None, seed: int) -> Sequence[int]:
    if limit is None or limit >= n_rows:
        return range(n_rows)
    return sorted(random.Random(seed).sample(range(n_rows), limit))


# --- rows ------------------------------------------------------------------------------------------------


class _Columns(NamedTuple):
    prompt: str
    answer: str | None
    verified: bool  # the source says itself how its rows are scored
    tests: tuple[str, ...]  # of programs, and what belongs to them
    # Where some rows have tests, what may hold the prompt of one that has them, and of one that has none.
    programs: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    taught: str | None = None
    context: str | None = None
    routes: Routes | None = None

    def used(self) -> list[str]:
        scoring = (*(("verifier", "metadata") if self.verified else ()), *self.tests)
        route = None if self.routes is None else self.routes.column
        names = (self.prompt, *self.programs, *self.others, self.answer, self.taught, self.context, route, *scoring)
        return list(dict.fromkeys(name for name in names if name is not None))

    def of(self, raw: Row) -> "_Columns":
        """Those of one row: a source may mix problems with tests and others, in columns of their own."""
        if not self.tests:
            return self
        tested = has_tests(raw)
        names = self.programs if tested else self.others
        prompt = next((name for name in names if raw.get(name) is not None), names[0])
        return self._replace(prompt=prompt, tests=self.tests if tested else ())


def _choose_columns(
    source: str,
    found: list[str],
    prompt: str | None,
    answer: str | None,
    context: str | None,
    routes: Routes | None = None,
) -> _Columns:
    routes = _routes_in(found, routes, source)
    for wanted in (prompt, answer, context):
        if wanted is not None and wanted not in found:
            raise InputError(f"{source} has no column {wanted!r}{nearest(wanted, found)}; it has {found}")
    by_lower_name = {name.lower(): name for name in reversed(found)}
    tests = test_columns(found)
    known = PROGRAM_PROMPT_COLUMNS if tests else PROMPT_COLUMNS
    guesses = _guesses(known, by_lower_name, prompt)
    if not guesses:
        raise InputError(
            f"{source} has none of the prompt columns {list(known)}; it has {found}: "
            f"name the right one with {named('prompt_column')}"
        )
    answers = _guesses(ANSWER_COLUMNS, by_lower_name, answer)
    taught, told = (name if name in found else None for name in (TEACHER_PROMPT, PRIVILEGED_CONTEXT))
    chosen = (guesses[0], next(iter(answers), None))
    both = (guesses, _guesses((*PROMPT_COLUMNS, *PROGRAM_PROMPT_COLUMNS), by_lower_name, prompt)) if tests else ((), ())
    return _Columns(*chosen, "verifier" in found, tests, *both, taught, context or told, routes)


def _guesses(known: Iterable[str], by_lower_name: Mapping[str, str], chosen: str | None) -> tuple[str, ...]:
    """The columns of a source that have a known name, or the one that was chosen."""
    return tuple(by_lower_name[name] for name in known if name in by_lower_name) if chosen is None else (chosen,)


def _generated(row: Row, context: str | None, which: str | None, routes: Routes | None, source: str) -> list[Row]:
    """A row of a generated source, with one of its columns for the teacher; of a conversation, a row for each turn."""
    routes = _routes_in(row, routes, source)
    if "messages" in row:
        plain = {"answer": "", "verifier": row["verifier"]}
        turns = turns_of(row["messages"], which or "last", source)
        found = [
            plain | {"prompt": turn.prompt, "metadata": turn.described("{}", source), "solution": turn.reference}
            for turn in turns
        ]
    else:
        refuse(source, assistant_turns=which)
        found = [row]
    offered = [name for name in ("answer", "solution") if name in found[0] and (name == "solution" or found[0][name])]
    if context is not None and context not in offered:
        raise InputError(f"{source} has no column {context!r} for the teacher; it has {', '.join(offered)}")
    kept = ("prompt", "answer", "verifier", "metadata")
    more = {} if routes is None else {routes.column: routes.name_in(row, source)}
    return [
        {name: one[name] for name in kept} | ({} if context is None else {PRIVILEGED_CONTEXT: one[context]}) | more
        for one in found
    ]


def _rows(raw: Row, columns: _Columns, which: str | None, place: str) -> list[Row]:
    """The prompts in one row of any source, of a conversation one for each of its turns that are meant."""
    if which is None:
        return [_convert(raw, columns, place)]
    if which == "all" and columns.taught is not None:
        raise InputError(
            f"{place} has a {columns.taught}, which is of one prompt, and {named('assistant_turns')} is 'all'; give "
            f"the teacher a {PRIVILEGED_CONTEXT}, or distil the last turn"
        )
    found = []
    for turn in turns_of(raw.get(columns.prompt), which, f"column {columns.prompt!r} of {place}"):
        reply = {"role": "assistant", "content": turn.reference}
        # An answer, and whatever else checks one, is of the last turn.
        own = columns if turn.is_last else columns._replace(answer=None, tests=(), verified=False)
        row = _convert({**raw, columns.prompt: [*turn.prompt, reply]}, own, place)
        found.append(row | {"metadata": turn.described(row["metadata"], place)})
    return found


def _routes_in(columns: Collection[str], routes: Routes | None, source: str) -> Routes | None:
    """Whose rows are, where these columns say it. Raises ValueError where they must and do not."""
    if routes is None or (routes.column not in columns and not routes.required):
        return None
    routes.check_columns([*columns], source)
    return routes


def _convert(raw: Row, columns: _Columns, place: str) -> Row:
    """One row of any source as a row of ours; `place` names it in errors."""
    messages, reply = read_messages(raw.get(columns.prompt), f"column {columns.prompt!r} of {place}")
    scoring = _scoring(raw, place) if columns.verified else {"verifier": "math", "metadata": "{}"}
    taught = _taught(raw, columns, place)
    if columns.routes is not None:
        taught[columns.routes.column] = columns.routes.name_in(raw, place)
    says_nothing = not columns.verified or raw.get("verifier") in _NO_VERIFIER
    if columns.tests and (says_nothing or scoring == {"verifier": PYTHON, "metadata": "{}"}):
        return _as_text(program_row(messages, raw, place) | taught, place)
    if columns.answer is None:
        answer = "" if reply is None else (last_boxed(reply) or "")
    else:
        answer = _answer(raw.get(columns.answer), f"column {columns.answer!r} of {place}")
    return _as_text({"prompt": messages, "answer": answer, **scoring, **taught}, place)


def _taught(raw: Row, columns: _Columns, place: str) -> Row:
    """What the teacher reads, where the source says it."""
    found: Row = {}
    if columns.taught is not None:
        found[TEACHER_PROMPT], _ = read_messages(raw.get(columns.taught), f"column {columns.taught!r} of {place}")
    if columns.context is not None:
        found[PRIVILEGED_CONTEXT] = _context(raw.get(columns.context), f"column {columns.context!r} of {place}")
    return found


def _as_text(row: Row, place: str) -> Row:
    """The row. Raises ValueError for one whose texts are none."""
    chats = [value for value in row.values() if isinstance(value, list)]
    texts = [value for value in row.values() if isinstance(value, str)]
    for text in [*(message["content"] for chat in chats for message in chat), *texts]:
        check_text(text, place)
    return row


def _scoring(raw: Row, place: str) -> dict[str, str]:
    """The `verifier` and `metadata` that a source states for a row itself."""
    verifier, metadata = raw.get("verifier"), raw.get("metadata") or "{}"
    verifier = "math" if verifier in _NO_VERIFIER else verifier
    check_verifier(verifier, f"column 'verifier' of {place} is")
    if isinstance(metadata, dict):
        try:
            metadata = json.dumps(metadata, ensure_ascii=False)  # so that what is no text is found
        except (TypeError, ValueError, RecursionError) as error:  # a table may hold dates, or bytes
            raise InputError(f"column 'metadata' of {place} cannot be written as JSON: {error}") from error
    if not isinstance(metadata, str):
        raise InputError(f"column 'metadata' of {place} is {kind(metadata)}; it must be an object, or JSON as text")
    return {"verifier": str(verifier), "metadata": metadata}


def _answer(value: Any, place: str) -> str:
    """A reference answer as text: of a worked solution its final answer, of a list all of its entries."""
    if value is None:
        return ""
    if isinstance(value, str):
        return reference_answer(value)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return ", ".join(reference_answer(item).strip("$") for item in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value == int(value) else repr(value)
    raise InputError(f"{place} is {kind(value)}; an answer is text, a number, or a list of texts")


def _context(value: Any, place: str) -> str:
    """What only the teacher reads."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{place} is {'empty' if isinstance(value, str) else kind(value)}; the teacher's is text")
    return value


def _to_dataset(rows: list[Row], routes: Routes | None) -> "Dataset":
    from datasets import Dataset, Features, List, Value

    text = Value("string")
    messages = List({"role": text, "content": text})
    columns = {"prompt": messages, "answer": text, "verifier": text, "metadata": text}
    more = {TEACHER_PROMPT: messages, PRIVILEGED_CONTEXT: text}
    if routes is not None:
        more[routes.column] = text
    features = Features(columns | {name: kind for name, kind in more.items() if rows and name in rows[0]})
    return Dataset.from_list(rows, features=features)
