"""Where rows come from: the zoo, files, folders and the hub, none of them trusted; reasoning-gym is `trb.tasks.gym`.

A folder is read without leaving it, whatever its card, its links or its columns say; nothing touches the network unless
a hub name was given. `datasets` is imported inside functions: the process that grades answers does without it.
"""

import json
import re
import reprlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl

from trb.errors import InputError, MissingFileError, did_you_mean, named, nearest
from trb.safety.untrusted import foreign_directory, parse_json, parse_yaml, printable, read_object, require_inside
from trb.tasks.answers import Row

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "GENERATED_ROWS",
    "GENERATORS",
    "REASONING_GYM",
    "ZOO",
    "kind",
    "open_table",
    "refuse",
    "task_settings",
    "zoo_rows",
]

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")

GENERATED_ROWS = 1000  # rows of a generated source (zoo, reasoning-gym) when no limit is given

ZOO, REASONING_GYM = "zoo:", "reasoning-gym:"
GENERATORS = (ZOO, REASONING_GYM)  # what a generated source begins with


def zoo_rows(spec: str, split: str, n: int, seed: int) -> list[Row]:
    from trb.zoo import TASKS

    name, _, query = spec.removeprefix(ZOO).partition("?")
    if name not in TASKS:
        tasks = ", ".join(f"zoo:{task}" for task in TASKS)
        raise InputError(f"unknown task {spec!r}; the zoo has {tasks}{did_you_mean(name, TASKS)}")
    task = TASKS[name]
    settings = task_settings(spec, query, {task.unit, *task.settings})
    size = settings.pop(task.unit, None)
    if not isinstance(size, int | None):
        raise InputError(f"{spec!r}: {task.unit} is {size!r}; give a whole number")
    task = task.with_settings(**settings)
    plain = {"verifier": "exact", "metadata": "{}"}
    return [
        plain
        | row
        | ({} if "messages" in row else {"solution": task.solution(row["prompt"][0]["content"].partition("\n\n")[0])})
        for row in task.problems(n, seed=seed, split=split, size=size)
    ]


def task_settings(spec: str, query: str, valid: set[str]) -> dict[str, Any]:
    """What a generated source is asked to be, `key=value&key=value`. Raises ValueError for a setting it has not."""
    if not query:
        return {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError as error:
        raise InputError(f"{spec!r}: write the task's settings as ?key=value&key=value ({error})") from error
    settings = {}
    for key, value in pairs:
        if key in ("seed", "size"):
            instead = named("seed" if key == "seed" else "limit")
            raise InputError(f"{spec!r}: {key!r} is not a setting here; use {instead}")
        if key not in valid:
            raise InputError(f"{spec!r}: the task has no setting {key!r}{nearest(key, valid)}")
        settings[key] = _literal(value)
    return settings


def _literal(text: str) -> Any:
    """A query value as JSON where it is JSON (numbers, true, lists), else as text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


class _Table(NamedTuple):
    """Rows that have not been converted yet, wherever they live. Columns that are not asked for are not read."""

    columns: list[str]
    n_rows: int
    take: Callable[[Sequence[int], list[str]], list[Row]]  # of ascending indices


def open_table(spec: str, split: str, revision: str | None) -> _Table:
    path = Path(spec).expanduser()
    if path.is_dir():
        refuse(spec, revision=revision)
        return _from_folder(path, split)
    written_as_path = path.is_absolute() or spec.startswith(("./", "../", "~"))
    if path.suffix in FILE_SUFFIXES or path.exists() or written_as_path:
        refuse(spec, revision=revision)
        return _from_file(path)
    return _from_hub(spec, split, revision)


def _from_file(path: Path) -> _Table:
    if not path.exists():
        raise MissingFileError(f"there is no file {path}{_nearest_path(path)}")
    if path.suffix not in FILE_SUFFIXES:
        raise InputError(f"{path} is no dataset file; its name must end in {', '.join(FILE_SUFFIXES)}")
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
        raise InputError(f"{path} is not a readable {path.suffix[1:]} file: {error}") from error


def _read_parquet(path: Path) -> _Table:
    import pyarrow.parquet as pq

    def take(indices: Sequence[int], columns: list[str]) -> list[Row]:
        wanted = _once(path, names, columns)
        # Given a file and not its path, which could be taken for an address or for a part of a larger data set.
        with _readable(path), path.open("rb") as file:
            # What is read may be more: a name stands for all that begins with it and a dot.
            return _plain(pq.ParquetFile(file).read(columns=wanted).select(wanted).take(list(indices)))

    with _readable(path), path.open("rb") as file:
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
        return _Table(names, parquet.metadata.num_rows, take)


def _read_arrow(path: Path) -> _Table:
    import pyarrow as pa

    with _readable(path), pa.memory_map(str(path)) as file:
        table = pa.ipc.open_stream(file).read_all()

    def take(indices: Sequence[int], columns: list[str]) -> list[Row]:
        chosen = table.select(_once(path, table.column_names, columns))
        with _readable(path):
            chosen.validate(full=True)  # what is in such a file is used as it lies there: offsets that lead elsewhere
            return _plain(chosen.take(list(indices)))

    return _Table(table.column_names, table.num_rows, take)


def _once(path: Path, names: list[str], wanted: list[str]) -> list[str]:
    """Those of the wanted columns that a file has. Raises InputError for one that it has twice."""
    for name in wanted:
        if (count := names.count(name)) > 1:
            raise InputError(
                f"{path} has {count} columns {name!r}, and only one can be meant: rename or remove the others"
            )
    return [name for name in wanted if name in names]


def _plain(table: Any) -> list[Row]:
    """The rows of an Arrow table in Python's own types; pictures and recordings stay what is written there, unopened.

    A number of few bits is what it is written as: 0.1, and not 0.10000000149.
    """
    import pyarrow as pa

    for place, column in enumerate(table.columns):
        if column.type in (pa.float16(), pa.float32()):
            few = column.type.to_pandas_dtype()
            exact = [None if value is None else float(str(few(value))) for value in column.to_pylist()]
            table = table.set_column(place, table.column_names[place], pa.array(exact, pa.float64()))
    return table.to_pylist()


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
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            numbered = [(f"row {index + 1}", row) for index, row in enumerate(parse_json(text))]
        except ValueError as error:
            raise InputError(f"{path} is not valid JSON: {error}") from error
    else:
        numbered = [
            (f"line {number}", _parse_line(line, f"line {number} of {path}"))
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    for place, row in numbered:
        if not isinstance(row, dict):
            raise InputError(f"{place} of {path} is {kind(row)}; every row must be a JSON object")
    return [row for _, row in numbered]


def _parse_line(line: str, place: str) -> Any:
    try:
        return parse_json(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place} is not valid JSON ({error.msg} at column {error.colno})") from error
    except ValueError as error:  # numbers of thousands of digits, thousands of brackets
        raise InputError(f"{place} cannot be read: {error}") from error


def _from_folder(path: Path, split: str) -> _Table:
    from huggingface_hub.constants import HF_HUB_CACHE

    foreign_directory(path, also=Path(HF_HUB_CACHE))
    try:
        saved = _saved_dataset(path, split)
        files = _files_by_card(path, split) if saved is None else _files_of_saved(saved)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # damaged files raise whatever the reader of their format raises
        raise InputError(f"the folder {path} cannot be loaded as a dataset: {error}") from error
    return _joined([_open_file(file) for file in files])


def _saved_dataset(path: Path, split: str) -> Path | None:
    """The folder with one split of what `datasets` saved, if it did."""
    if (path / "dataset_dict.json").is_file():
        splits = read_object(path / "dataset_dict.json").get("splits") or []
        _check_plain(path / "dataset_dict.json", splits)
        if split not in splits:
            raise InputError(f"it has no split {split!r}, only {sorted(splits)}")
        return path / split
    return path if (path / "state.json").is_file() else None


def _files_of_saved(path: Path) -> list[Path]:
    state = read_object(path / "state.json")
    files = state.get("_data_files") or []
    names: list[Any] = [file.get("filename") if isinstance(file, dict) else file for file in files]
    _check_plain(path / "state.json", names)
    if state.get("_indices_data_files"):
        raise InputError(f"{path / 'state.json'} has indices beside its rows, which old versions wrote: save it again")
    if not names or not all(name.endswith(".arrow") for name in names):
        raise InputError(f"{path / 'state.json'} names {names}; rows are in *.arrow files")
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
        raise InputError(f"it holds no {', '.join(FILE_SUFFIXES)} file")
    if split not in splits:
        raise InputError(f"it has no split {split!r}, only {sorted(splits)}")
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
        raise InputError(f"its card has the configurations {names} and says of none that it is the default")
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
        raise InputError(f"the settings in {path} cannot be read: {error}") from error
    configs = card.get("configs") if isinstance(card, dict) else None
    for pattern in _texts(configs):
        if "://" in pattern or "::" in pattern or pattern.startswith(("/", "~")) or ".." in re.split(r"[/\\]", pattern):
            raise InputError(f"{path} names {printable(pattern)!r:.200}, outside of its folder: load that by itself")
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
            raise InputError(f"{path} names {printable(str(name))!r:.200}; it must name files of its own folder")


def _from_hub(spec: str, split: str, revision: str | None) -> _Table:
    name, _, config = spec.partition(":")
    local = _nearest_path(Path(name))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise InputError(f"{spec!r} is no file, no folder and no hub name (owner/name){local}")
    import datasets

    try:
        loaded = datasets.load_dataset(name, config or None, split=split, revision=revision)
    except (OSError, ValueError) as error:
        # The names of benchmarks look like data sets: they are those of test problems, which evaluations read.
        hint = "; the benchmark of that name is for evaluations alone, and its training set is openai/gsm8k:main"
        raise InputError(
            f"{spec!r} is not a local file or folder{local}, and loading it from the hub failed: {error}"
            f"{hint if spec == 'gsm8k' else ''}"
        ) from error
    return _from_dataset(loaded)


def _from_dataset(dataset: "Dataset") -> _Table:
    def take(indices: Sequence[int], columns: list[str]) -> list[Row]:
        used = [name for name in columns if name in dataset.column_names]
        # As Arrow holds them: decoding opens the files and addresses that pictures and recordings name.
        table: Any = dataset.select_columns(used).select(indices).with_format("arrow")[:]
        return _plain(table)

    return _Table(dataset.column_names, len(dataset), take)


def refuse(spec: str, **arguments: Any) -> None:
    """Options that a source cannot honour are errors, not noise."""
    for name, value in arguments.items():
        if value is not None:
            raise InputError(f"{named(name)}={value!r} means nothing for {spec!r}; leave it out")


def kind(value: Any) -> str:
    # reprlib: a value may be nested more deeply than str can follow.
    shown = reprlib.repr(value) if isinstance(value, list | dict) else str(value)
    return "missing (null)" if value is None else f"of type {type(value).__name__} ({shown[:40]!r})"


def _nearest_path(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})"
    return nearest(path.name, (sibling.name for sibling in path.parent.iterdir()))
