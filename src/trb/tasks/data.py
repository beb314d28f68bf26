"""Prompts: where they come from, and how they become token ids.

Every source ends as one `datasets.Dataset` with the columns `prompt` (a list of `{"role", "content"}`
messages that ends before the assistant speaks), `answer` (str, empty where there is none), `verifier`
("math", "exact" or "reasoning-gym:TASK") and `metadata` (a JSON object as text).

Left out on purpose: shuffling, repeating a prompt for several rollouts and padding belong to the trainer; deciding
whether an answer is right belongs to `trb.tasks.grading`. Nothing here touches the network unless the specification is
a hub name, and a folder is read without leaving it, whatever its card, its links or its columns say. `datasets` is
imported inside functions so that `trb.tasks.grading`, and the worker process it starts, can use the text helpers at the
end of this file without paying for it.
"""

import hashlib
import json
import logging
import math
import random
import re
import reprlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl

from trb.errors import did_you_mean
from trb.safety.templates import check_chat_template
from trb.safety.untrusted import foreign_directory, parse_json, parse_yaml, printable, read_object, require_inside

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "MATH_SYSTEM_PROMPT",
    "Box",
    "boxed_answers",
    "check_lengths",
    "decode_metadata",
    "encode_metadata",
    "last_boxed",
    "load_prompts",
    "render",
    "token_ids",
]

logger = logging.getLogger(__name__)

# Names are made of a few words; half of one in common is worth a hint.
_nearest = partial(did_you_mean, cutoff=0.5)

MATH_SYSTEM_PROMPT = "Reason step by step, and put the final answer in \\boxed{}."

PROMPT_COLUMNS = ("prompt", "question", "problem", "messages", "conversations", "instruction")
ANSWER_COLUMNS = ("answer", "final_answer", "expected_answer", "ground_truth", "solution")
FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
GENERATED_ROWS = 1000  # rows of a generated source (zoo, reasoning-gym) when no limit is given
REASONING_GYM = "reasoning-gym:"

Row = dict[str, Any]
Message = dict[str, str]


def load_prompts(
    spec: str | Path,
    *,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    system_prompt: str | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    revision: str | None = None,
) -> "Dataset":
    """Load prompts from a file, a local dataset folder, a task generator or the hub.

    `spec` is one of:

    - `zoo:chains`, the task of the embedded model pair (`zoo:chains?operands=8` for longer ones), or `zoo:clock`;
    - `reasoning-gym:TASK` or `reasoning-gym:TASK?key=value&key=value` (settings of that task);
    - a path ending in .jsonl, .json or .parquet: always a file, never a hub name;
    - an existing local folder (parquet or JSONL files, or one written by `Dataset.save_to_disk`);
    - anything else: a hub name, `owner/name` or `owner/name:config` (the only case that uses the network).

    `split` selects a split of a folder or hub dataset, and other problems of a generated source; a single file
    is one split, and read whole. `limit` keeps that many rows: a random subset drawn with `seed`, in
    source order (hub datasets are often sorted by topic); of a generated source, the number generated (1000
    by default). `system_prompt` replaces the row's own. Columns are guessed from common names unless given.
    An assistant turn at the end is not part of the prompt; where there is no answer column, the answer is the
    last \\boxed{} of that turn. Rows without an answer get `answer == ""`: good to train on, not to score.
    A source with a `verifier` column (this function's own output, saved) keeps it and its `metadata`.
    A few reasoning-gym tasks (word_ladder, ransom_note, ...) draw from sets, and repeat themselves in another
    process only under the same PYTHONHASHSEED; save such rows to a file to share them.

    Raises ValueError (FileNotFoundError for a missing file, ImportError for a missing extra) naming the
    offending row, column or name and the remedy. Rows and lines are counted from 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; give a positive number of rows, or None for all")
    name = str(spec)
    if name.startswith(("zoo:", REASONING_GYM)):
        _refuse(name, revision=revision, prompt_column=prompt_column, answer_column=answer_column)
        generate = _zoo_rows if name.startswith("zoo:") else _reasoning_gym_rows
        rows = generate(name, split, limit or GENERATED_ROWS, seed)
    else:
        table = _open_table(name, split, revision)
        if table.n_rows == 0:
            raise ValueError(f"{name} is empty: it has no rows")
        columns = _choose_columns(name, table.columns, prompt_column, answer_column)
        indices = _subset(table.n_rows, limit, seed)
        rows = [
            _convert(raw, columns, f"row {index + 1} of {name}")
            for index, raw in zip(indices, table.take(indices, columns.used()), strict=True)
        ]
    if system_prompt is not None:
        rows = [row | {"prompt": _with_system(row["prompt"], system_prompt)} for row in rows]
    return _to_dataset(rows)


def render(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Iterable[Mapping[str, Any]],
    *,
    plain: bool = False,
    **chat_template_kwargs: Any,
) -> list[list[int]]:
    """Turn each row's `prompt` into token ids with the tokenizer's chat template and generation prompt.

    `plain=True` ignores the template: the messages' contents joined by blank lines, for base models that
    have none. `chat_template_kwargs` go to the template (for example `enable_thinking=False`).
    Raises ValueError if the tokenizer has no chat template and `plain` is not set.
    """
    if plain:
        if chat_template_kwargs:
            raise ValueError(f"plain=True uses no chat template; remove {sorted(chat_template_kwargs)}")
        texts = ("\n\n".join(message["content"] for message in row["prompt"]) for row in rows)
        return [token_ids(tokenizer, text) for text in texts]
    if not tokenizer.chat_template and "chat_template" not in chat_template_kwargs:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; set tokenizer.chat_template "
            "(for instance to that of the instruct model), or pass plain=True to join messages by blank lines"
        )
    if "chat_template" in chat_template_kwargs:
        check_chat_template(chat_template_kwargs["chat_template"], "the argument chat_template")
    options = chat_template_kwargs | {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    rendered: list[Any] = [tokenizer.apply_chat_template(row["prompt"], **options) for row in rows]
    return [list(ids) for ids in rendered]


def token_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The ids of a prompt as text. One that begins with the BOS token, as a rendered chat does, gets no second."""
    ids: list[int] = list(tokenizer(text)["input_ids"])
    bos = tokenizer.bos_token
    if not bos or not text.startswith(str(bos)):
        return ids
    own: list[int] = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    added = ids[:1] == [tokenizer.bos_token_id] and ids[1 : 1 + len(own)] == own
    return ids[1:] if added else ids


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

    `overlong="error"` raises ValueError for the first such row; `"drop"` removes them and logs how many.
    Lengths are those of `render` with the same `plain` and template arguments.
    """
    if overlong not in ("error", "drop"):
        raise ValueError(f'overlong is {overlong!r}; use "error" or "drop"')
    lengths = [len(ids) for ids in render(tokenizer, dataset, plain=plain, **chat_template_kwargs)]
    kept = [index for index, length in enumerate(lengths) if length <= max_prompt_length]
    dropped = len(lengths) - len(kept)
    if dropped == 0:
        return dataset
    if overlong == "error" or not kept:
        row = next(index for index, length in enumerate(lengths) if length > max_prompt_length)
        remedy = (
            ""
            if overlong == "drop"
            else ', or drop such rows with overlong="drop" (in recipes, overlong_prompts: drop)'
        )
        raise ValueError(
            f"the prompt of row {row + 1} has {lengths[row]} tokens, more than the limit of "
            f"{max_prompt_length} ({dropped} of {len(lengths)} rows are); raise max_prompt_length{remedy}"
        )
    logger.warning("dropped %d of %d prompts over %d tokens", dropped, len(lengths), max_prompt_length)
    return dataset.select(kept)


def check_room(
    lengths: Sequence[int], name: str, max_new_tokens: int, limits: Mapping[str, int | None], *, knob: str
) -> None:
    """Refuse prompts that leave no room for their completions, before the first is sampled.

    Args:
        lengths: tokens of every prompt, in the order of the rows.
        name: what the rows are called.
        max_new_tokens: the longest completion.
        limits: tokens that a sequence may have at most, by what limits it; None for no limit.
        knob: the option that sets `max_new_tokens`.

    Raises:
        ValueError: names the first such row (from 0, as it is indexed), and counts them.
    """
    owner, limit = min(
        ((owner, limit) for owner, limit in limits.items() if limit is not None),
        key=lambda pair: pair[1],
        default=("", None),
    )
    if limit is None:
        return
    overlong = [row for row, length in enumerate(lengths) if length + max_new_tokens > limit]
    if overlong:
        raise ValueError(
            f"{name}[{overlong[0]}] has {lengths[overlong[0]]} tokens, and with {knob}={max_new_tokens} more exceeds "
            f"the {limit} positions of {owner} ({len(overlong)} of {len(lengths)} rows do); shorten or drop such rows, "
            f"or lower {knob}"
        )


# --- generated sources -----------------------------------------------------------------------------------


def _zoo_rows(spec: str, split: str, n: int, seed: int) -> list[Row]:
    from trb.zoo import TASKS

    name, _, query = spec.removeprefix("zoo:").partition("?")
    if name not in TASKS:
        raise ValueError(f"unknown task {spec!r}; the zoo has {', '.join(f'zoo:{task}' for task in TASKS)}")
    task = TASKS[name]
    size = _task_settings(spec, query, {task.unit}).get(task.unit)
    if not isinstance(size, int | None):
        raise ValueError(f"{spec!r}: {task.unit} is {size!r}; give a whole number")
    return [
        {"prompt": problem["prompt"], "answer": problem["answer"], "verifier": "exact", "metadata": "{}"}
        for problem in task.problems(n, seed=seed, split=split, size=size)
    ]


def _reasoning_gym_rows(spec: str, split: str, n: int, seed: int) -> list[Row]:
    task, _, query = spec.removeprefix(REASONING_GYM).partition("?")
    gym = import_reasoning_gym()
    registry = gym.factory.DATASETS
    if task not in registry:
        raise ValueError(f"unknown reasoning-gym task {task!r}{_nearest(task, registry)}")
    settings = _task_settings(spec, query, {field.name for field in fields(registry[task][1])})
    try:
        dataset = gym.create_dataset(task, seed=_generator_seed(seed, split), size=n, **settings)
        entries = [dataset[index] for index in range(n)]
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"reasoning-gym refuses {spec!r}: {error}") from error
    return [
        {
            "prompt": [{"role": "user", "content": entry["question"]}],
            "answer": "" if entry["answer"] is None else str(entry["answer"]),
            "verifier": REASONING_GYM + task,
            "metadata": encode_metadata({"task": task, "settings": settings, "entry": entry}),
        }
        for entry in entries
    ]


def import_reasoning_gym() -> ModuleType:
    """The `reasoning_gym` module; ImportError names the extra that installs it."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(f"reasoning-gym tasks need the extra package ({error}): pip install 'trb[tasks]'") from error
    return reasoning_gym


def _task_settings(spec: str, query: str, valid: set[str]) -> dict[str, Any]:
    if not query:
        return {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError as error:
        raise ValueError(f"{spec!r}: write the task's settings as ?key=value&key=value ({error})") from error
    settings = {}
    for key, value in pairs:
        if key in ("seed", "size"):
            raise ValueError(f"{spec!r}: {key!r} is not a setting here; use the seed and limit arguments")
        if key not in valid:
            raise ValueError(f"{spec!r}: the task has no setting {key!r}{_nearest(key, valid)}")
        settings[key] = _literal(value)
    return settings


def _literal(text: str) -> Any:
    """A query value as JSON where it is JSON (numbers, true, lists), else as text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _generator_seed(seed: int, split: str) -> int:
    """A 31-bit generator seed. Hashed because the generator adds the row index to it: neighbouring seeds, and
    the splits of one seed, would otherwise share all but a few of their problems."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{split}".encode()).digest()[:4], "big") >> 1


# --- files, folders, the hub -----------------------------------------------------------------------------


class _Table(NamedTuple):
    """Rows that have not been converted yet, wherever they live. Columns that are not asked for are not read."""

    columns: list[str]
    n_rows: int
    take: Callable[[Sequence[int], list[str]], list[Row]]  # of ascending indices


def _open_table(spec: str, split: str, revision: str | None) -> _Table:
    path = Path(spec).expanduser()
    if path.is_dir():
        _refuse(spec, revision=revision)
        return _from_folder(path, split)
    written_as_path = path.is_absolute() or spec.startswith(("./", "../", "~"))
    if path.suffix in FILE_SUFFIXES or path.exists() or written_as_path:
        _refuse(spec, revision=revision)
        return _from_file(path)
    return _from_hub(spec, split, revision)


def _from_file(path: Path) -> _Table:
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}{_nearest_path(path)}")
    if path.suffix not in FILE_SUFFIXES:
        raise ValueError(f"{path} is no dataset file; its name must end in {', '.join(FILE_SUFFIXES)}")
    return _open_file(path)


def _open_file(path: Path) -> _Table:
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix == ".arrow":
        return _read_arrow(path)
    rows = _read_json(path)
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def take(indices: Sequence[int], wanted: list[str]) -> list[Row]:
        return [{name: rows[index][name] for name in wanted if name in rows[index]} for index in indices]

    return _Table(columns, len(rows), take)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:  # text that is no UTF-8 shows when it is taken
        raise ValueError(f"{path} is not a readable {path.suffix[1:]} file: {error}") from error


def _read_parquet(path: Path) -> _Table:
    import pyarrow.parquet as pq

    def take(indices: Sequence[int], columns: list[str]) -> list[Row]:
        # Given a file and not its path, which could be taken for an address or for a part of a larger data set.
        with _readable(path), path.open("rb") as file:
            return _rows_of(pq.ParquetFile(file).read(columns=columns), indices, columns)

    with _readable(path), path.open("rb") as file:
        parquet = pq.ParquetFile(file)
        return _Table(parquet.schema_arrow.names, parquet.metadata.num_rows, take)


def _read_arrow(path: Path) -> _Table:
    import pyarrow as pa

    with _readable(path), pa.memory_map(str(path)) as file:
        table = pa.ipc.open_stream(file).read_all()

    def take(indices: Sequence[int], columns: list[str]) -> list[Row]:
        with _readable(path):
            chosen = table.select([name for name in columns if name in table.column_names])
            chosen.validate(full=True)  # what is in such a file is used as it lies there: offsets that lead elsewhere
            return _rows_of(chosen, indices, columns)

    return _Table(table.column_names, table.num_rows, take)


def _rows_of(table: Any, indices: Sequence[int], columns: list[str]) -> list[Row]:
    """Rows of an Arrow table as they are stored: pictures and recordings stay what is written there, unopened."""
    return table.select([name for name in columns if name in table.column_names]).take(list(indices)).to_pylist()


def _joined(tables: list[_Table]) -> _Table:
    starts = list(accumulate((table.n_rows for table in tables), initial=0))

    def take(indices: Sequence[int], columns: list[str]) -> list[Row]:
        rows: list[Row] = []
        for table, start in zip(tables, starts, strict=False):
            inside = indices[bisect_left(indices, start) : bisect_left(indices, start + table.n_rows)]
            rows += table.take([index - start for index in inside], columns) if inside else []
        return rows

    return _Table(list(dict.fromkeys(name for table in tables for name in table.columns)), starts[-1], take)


def _read_json(path: Path) -> list[Row]:
    """The rows of a JSONL file, or of a JSON file holding one array of objects. Blank lines are skipped."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            numbered = [(f"row {index + 1}", row) for index, row in enumerate(parse_json(text))]
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
    else:
        numbered = [
            (f"line {number}", _parse_line(line, f"line {number} of {path}"))
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    for place, row in numbered:
        if not isinstance(row, dict):
            raise ValueError(f"{place} of {path} is {_kind(row)}; every row must be a JSON object")
    return [row for _, row in numbered]


def _parse_line(line: str, place: str) -> Any:
    try:
        return parse_json(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not valid JSON ({error.msg} at column {error.colno})") from error
    except ValueError as error:  # numbers of thousands of digits, thousands of brackets
        raise ValueError(f"{place} cannot be read: {error}") from error


def _from_folder(path: Path, split: str) -> _Table:
    from huggingface_hub.constants import HF_HUB_CACHE

    foreign_directory(path, also=Path(HF_HUB_CACHE))
    try:
        saved = _saved_dataset(path, split)
        files = _files_by_card(path, split) if saved is None else _files_of_saved(saved)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # damaged files raise whatever the reader of their format raises
        raise ValueError(f"the folder {path} cannot be loaded as a dataset: {error}") from error
    return _joined([_open_file(file) for file in files])


def _saved_dataset(path: Path, split: str) -> Path | None:
    """The folder with one split of what `datasets` saved, if it did."""
    if (path / "dataset_dict.json").is_file():
        splits = read_object(path / "dataset_dict.json").get("splits") or []
        _check_plain(path / "dataset_dict.json", splits)
        if split not in splits:
            raise ValueError(f"it has no split {split!r}, only {sorted(splits)}")
        return path / split
    return path if (path / "state.json").is_file() else None


def _files_of_saved(path: Path) -> list[Path]:
    state = read_object(path / "state.json")
    files = state.get("_data_files") or []
    names: list[Any] = [file.get("filename") if isinstance(file, dict) else file for file in files]
    _check_plain(path / "state.json", names)
    if state.get("_indices_data_files"):
        raise ValueError(f"{path / 'state.json'} has indices beside its rows, which old versions wrote: save it again")
    if not names or not all(name.endswith(".arrow") for name in names):
        raise ValueError(f"{path / 'state.json'} names {names}; rows are in *.arrow files")
    return [path / name for name in names]


def _files_by_card(path: Path, split: str) -> list[Path]:
    """The files of a split: those its card names, else those whose names or folders say so, as `datasets` sorts them.

    Only where they are is asked of `datasets`, which would open what they name: pictures, other folders, addresses.
    """
    from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns
    from huggingface_hub.constants import HF_HUB_CACHE

    settings = _card(path)
    base = str((path / (settings.get("data_dir") or "")).resolve())
    patterns = settings.get("data_files")
    found = DataFilesDict.from_patterns(
        get_data_patterns(base) if patterns is None else sanitize_patterns(patterns),
        base_path=base,
        allowed_extensions=list(FILE_SUFFIXES),
    )
    splits = {str(name): list(files) for name, files in found.items() if files}
    if not splits:
        raise ValueError(f"it holds no {', '.join(FILE_SUFFIXES)} file")
    if split not in splits:
        raise ValueError(f"it has no split {split!r}, only {sorted(splits)}")
    return [require_inside(Path(file), path, also=Path(HF_HUB_CACHE)) for file in splits[split]]


def _card(path: Path) -> dict[str, Any]:
    """What the cards of a folder say about its files: `data_files` and `data_dir`, or neither."""
    cards = [path / name for name in ("README.md", ".huggingface.yaml") if (path / name).is_file()]
    configs = [found for card in cards if (found := _check_card(card))]
    if not configs:
        return {}
    chosen = [
        config
        for config in configs[-1]
        if len(configs[-1]) == 1 or config.get("default") or config.get("config_name") == "default"
    ]
    if len(chosen) != 1:
        names = [config.get("config_name") for config in configs[-1]]
        raise ValueError(f"its card has the configurations {names} and says of none that it is the default")
    return chosen[0]


def _check_card(path: Path) -> list[dict[str, Any]]:
    """The configurations in a dataset card. Raises ValueError for one whose files are not in its own folder."""
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".md":
        block = REGEX_YAML_BLOCK.search(text)
        text = block[2] if block else ""
    try:
        card = parse_yaml(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"the settings in {path} cannot be read: {error}") from error
    configs = card.get("configs") if isinstance(card, dict) else None
    for pattern in _texts(configs):
        if "://" in pattern or "::" in pattern or pattern.startswith(("/", "~")) or ".." in re.split(r"[/\\]", pattern):
            raise ValueError(f"{path} names {printable(pattern)!r:.200}, outside of its folder: load that by itself")
    return [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _check_plain(path: Path, names: Any) -> None:
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str) or name != Path(name).name or "\\" in name:
            raise ValueError(f"{path} names {printable(str(name))!r:.200}; it must name files of its own folder")


def _from_hub(spec: str, split: str, revision: str | None) -> _Table:
    name, _, config = spec.partition(":")
    local = _nearest_path(Path(name))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(f"{spec!r} is no file, no folder and no hub name (owner/name){local}")
    import datasets

    try:
        loaded = datasets.load_dataset(name, config or None, split=split, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{spec!r} is not a local file or folder{local}, and loading it from the hub failed: {error}"
        ) from error
    return _from_dataset(loaded)


def _from_dataset(dataset: "Dataset") -> _Table:
    def take(indices: Sequence[int], columns: list[str]) -> list[Row]:
        used = [name for name in columns if name in dataset.column_names]
        # As Arrow holds them: decoding opens the files and addresses that pictures and recordings name.
        table: Any = dataset.select_columns(used).select(indices).with_format("arrow")[:]
        return table.to_pylist()

    return _Table(dataset.column_names, len(dataset), take)


def _subset(n_rows: int, limit: int | None, seed: int) -> Sequence[int]:
    if limit is None or limit >= n_rows:
        return range(n_rows)
    return sorted(random.Random(seed).sample(range(n_rows), limit))


def _refuse(spec: str, **arguments: Any) -> None:
    """Options that a source cannot honour are errors, not noise."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name}={value!r} means nothing for {spec!r}; leave it out")


# --- rows ------------------------------------------------------------------------------------------------


class _Columns(NamedTuple):
    prompt: str
    answer: str | None
    verified: bool  # the source says itself how its rows are scored

    def used(self) -> list[str]:
        scoring = ("verifier", "metadata") if self.verified else ()
        return list(dict.fromkeys(name for name in (self.prompt, self.answer, *scoring) if name is not None))


def _choose_columns(source: str, found: list[str], prompt: str | None, answer: str | None) -> _Columns:
    for wanted in (prompt, answer):
        if wanted is not None and wanted not in found:
            raise ValueError(f"{source} has no column {wanted!r}{_nearest(wanted, found)}; it has {found}")
    by_lower_name = {name.lower(): name for name in reversed(found)}
    guesses = [by_lower_name[name] for name in PROMPT_COLUMNS if name in by_lower_name]
    if prompt is None and not guesses:
        raise ValueError(
            f"{source} has none of the prompt columns {list(PROMPT_COLUMNS)}; it has {found}: "
            "name the right one with prompt_column"
        )
    answers = [by_lower_name[name] for name in ANSWER_COLUMNS if name in by_lower_name]
    return _Columns(prompt or guesses[0], answer or next(iter(answers), None), "verifier" in found)


def _convert(raw: Row, columns: _Columns, place: str) -> Row:
    """One row of any source as a row of ours; `place` names it in errors."""
    messages, reply = _messages(raw.get(columns.prompt), f"column {columns.prompt!r} of {place}")
    if columns.answer is None:
        answer = "" if reply is None else (last_boxed(reply) or "")
    else:
        answer = _answer(raw.get(columns.answer), f"column {columns.answer!r} of {place}")
    scoring = _scoring(raw, place) if columns.verified else {"verifier": "math", "metadata": "{}"}
    row = {"prompt": messages, "answer": answer, **scoring}
    try:
        "".join([*(message["content"] for message in messages), answer, *scoring.values()]).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} holds half a surrogate pair, which is no text: {error.reason}; remove it") from error
    return row


def _scoring(raw: Row, place: str) -> dict[str, str]:
    """The `verifier` and `metadata` that a source states for a row itself."""
    verifier, metadata = raw.get("verifier"), raw.get("metadata") or "{}"
    if verifier not in ("math", "exact") and not str(verifier).startswith(REASONING_GYM):
        raise ValueError(f"column 'verifier' of {place} is {verifier!r}; use 'math', 'exact' or 'reasoning-gym:TASK'")
    if not isinstance(metadata, str):
        raise ValueError(f"column 'metadata' of {place} is {_kind(metadata)}; it must be JSON as text")
    return {"verifier": str(verifier), "metadata": metadata}


_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
_ROLES |= {"human": "user", "gpt": "assistant"}


def _messages(value: Any, place: str) -> tuple[list[Message], str | None]:
    """The prompt as messages, and the assistant's reply that followed it in the source, if any."""
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{place} is empty")
        return [{"role": "user", "content": value}], None
    if not isinstance(value, list):
        raise ValueError(f"{place} is {_kind(value)}; a prompt is text or a list of messages")
    messages = [_message(item, f"message {number} in {place}") for number, item in enumerate(value, start=1)]
    reply = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else None
    if not any(message["role"] == "user" for message in messages):
        raise ValueError(f"{place} has no user message to answer")
    return messages, reply


def _message(item: Any, place: str) -> Message:
    """One message, in either common spelling: role/content or from/value."""
    if not isinstance(item, dict):
        raise ValueError(f"{place} is {_kind(item)}; it must be an object with 'role' and 'content'")
    keys = ("role", "content") if "role" in item else ("from", "value")
    role, content = (item.get(key) for key in keys)
    if role not in _ROLES:
        raise ValueError(f"{place} has the role {role!r}; known roles are {sorted(_ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"{place} has content of the wrong type: {_kind(content)}, not text")
    return {"role": _ROLES[role], "content": content}


def _with_system(messages: list[Message], system_prompt: str) -> list[Message]:
    rest = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": system_prompt}, *rest]


def _answer(value: Any, place: str) -> str:
    """A reference answer as text: of a worked solution its final answer, of a list all of its entries."""
    if value is None:
        return ""
    if isinstance(value, str):
        return _reference_answer(value)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return ", ".join(_reference_answer(item).strip("$") for item in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value == int(value) else repr(value)
    raise ValueError(f"{place} is {_kind(value)}; an answer is text, a number, or a list of texts")


def _to_dataset(rows: list[Row]) -> "Dataset":
    from datasets import Dataset, Features, List, Value

    text = Value("string")
    messages = List({"role": text, "content": text})
    features = Features({"prompt": messages, "answer": text, "verifier": text, "metadata": text})
    return Dataset.from_list(rows, features=features)


def _kind(value: Any) -> str:
    # reprlib: a value may be nested more deeply than str can follow.
    shown = reprlib.repr(value) if isinstance(value, list | dict) else str(value)
    return "missing (null)" if value is None else f"of type {type(value).__name__} ({shown[:40]!r})"


def _nearest_path(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})"
    return _nearest(path.name, (sibling.name for sibling in path.parent.iterdir()))


# --- metadata and answers inside text (light: also used in the verifier's worker) ------------------------


def encode_metadata(value: Mapping[str, Any]) -> str:
    """`value` as JSON that keeps tuples: some tasks compare grids made of them, and lists differ."""
    return json.dumps(_tag_tuples(value))


def decode_metadata(text: str) -> dict[str, Any]:
    """The inverse of `encode_metadata`."""
    return json.loads(text, object_hook=_untag_tuple)


def _untag_tuple(item: Row) -> Any:
    return tuple(item["tuple"]) if item.keys() == {"tuple"} else item


def _tag_tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tag_tuples(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return {"tuple": [_tag_tuples(item) for item in value]}
    return [_tag_tuples(item) for item in value] if isinstance(value, list) else value


class Box(NamedTuple):
    """One \\boxed{...} of a text: its content, and where the whole command starts and ends."""

    content: str
    start: int
    end: int


_BOX_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[\\{}]|[{}]")


def boxed_answers(text: str) -> list[Box]:
    """Every closed \\boxed{...} (or \\fbox{...}) of `text`, in order, in time linear in its length.

    A box that never closes (a completion cut short) is no answer. A box inside another is part of the outer
    one; a box that holds nothing but another box is that box.
    """
    spans: list[tuple[int, int, int, int]] = []  # start of: command, content; end of: content, command
    opened: list[tuple[int, int] | None] = []  # start of command and content; None for a brace that is no box
    for token in _BOX_TOKEN.finditer(text):
        found = token.group()
        if found == "{":
            opened.append(None)
        elif found == "}":
            box = opened.pop() if opened else None
            if box is not None:
                spans.append(_close(text, spans, *box, token))
        elif len(found) > 2:
            opened.append((token.start(), token.end()))
    return [Box(text[content:close].strip(), start, end) for start, content, close, end in spans]


def _close(
    text: str, spans: list[tuple[int, int, int, int]], start: int, content: int, brace: re.Match[str]
) -> tuple[int, int, int, int]:
    """The span of the box that ends at `brace`, after taking the boxes inside it off `spans`."""
    close, inside = brace.start(), []
    while spans and spans[-1][0] > start:
        inside.append(spans.pop())
    if len(inside) == 1:
        inner_start, inner_content, inner_close, inner_end = inside[0]
        if not text[content:inner_start].strip() and not text[inner_end:close].strip():
            content, close = inner_content, inner_close
    return start, content, close, brace.end()


def last_boxed(text: str) -> str | None:
    """The content of the last closed \\boxed{} of `text`, or None."""
    boxes = boxed_answers(text)
    return boxes[-1].content if boxes else None


def _reference_answer(text: str) -> str:
    """The final answer of a solution: what follows '####' (GSM8K), else its last \\boxed{}, else all."""
    if "####" in text:
        return text.rsplit("####", 1)[1].strip().replace(",", "")
    boxed = last_boxed(text)
    return text.strip() if boxed is None else boxed
