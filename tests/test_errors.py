"""Errors for people are of one family, by which the command line tells them from bugs."""

import ast
import errno
import importlib
import inspect
import os
import pickle
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import trb
from trb.errors import TrbError, is_for_people
from trb.models.modeling import UnsupportedModelError
from trb.sampling.rollout import NonFiniteLogitsError
from trb.studies.disks import DiskFullError
from trb.zoo import load

PACKAGE = Path(trb.__file__).parent

# (module, what is raised): why it is no TrbError.
OTHERS = {
    ("trb", "AttributeError"): "what Python asks of a module's __getattr__",
    ("trb.sampling.vllm.plugin", "AttributeError"): "the same",
    ("trb.cli.evaluate", "argparse.ArgumentTypeError"): "argparse's way; becomes what it says of the option",
    ("trb.cli", "KeyboardInterrupt"): "Ctrl-C, which the command line answers by itself",
    ("trb.cli.display", "BrokenPipeError"): "nobody reads on, which the command line answers by itself",
    ("trb.records", "PydanticCustomError"): "pydantic's way to refuse a value; becomes a RecordError",
    ("trb.safety.fields", "PydanticCustomError"): "the same",
    ("trb.measures", "PydanticCustomError"): "the same",
    ("trb.studies.yaml_files", "yaml.constructor.ConstructorError"): "PyYAML's way; becomes a ConfigError",
    ("trb.safety.untrusted", "pickle.UnpicklingError"): "pickle's way; caught around the reader",
    ("trb.safety.untrusted", "TypeError"): "a caller in this package that passes an unsafe loader is a bug",
    ("trb.safety.confinement", "PermissionError"): "stops what a model wrote, inside the process that checks answers",
    ("trb.safety.files", "BlockingIOError"): "becomes a RunDirectoryError that says which run is waited for",
    ("trb.kernels.building", "_BuildError"): "becomes a warning: torch computes without the library",
    ("trb.kernels.building", "PermissionError"): "the same",
    ("trb.tasks.grading", "TimeoutError"): "between the worker and its owner, who counts it",
    ("trb.tasks.grading", "EOFError"): "the same",
    ("trb.zoo.programs", "ValueError"): "no expression of the task; caught where an answer is read",
    ("trb.tasks.values", "LostError"): "between the two processes of a program, and no Exception: no test catches it",
    ("trb.tasks.values", "ValueError"): "of the program, in its own process: its value is too large",
    ("trb.tasks.program_host", "LostError"): "between the two processes of a program, which ends both",
    ("trb.tasks.program_host", "NameError"): "what Python says of a name that the program lacks, to its tests",
    ("trb.tasks.program_host", "TypeError"): "of the tests, in a process of their own, which they fail by",
    ("trb.tasks.program_host", "AttributeError"): "what Python asks of an object's __getattr__, there",
    ("trb.tasks.program_host", "StopIteration"): "what Python asks of an iterator, there",
    ("trb.tasks.program_host", "ValueError"): "tests that are none: said by the judge, and an InputError of the caller",
    ("trb.tasks.program_host", "_raised"): "the program's own error, raised again for its tests",
    ("trb.sampling.cache", "RuntimeError"): "the same as of the states",
    ("trb.sampling.states", "RuntimeError"): "found by the check of a model, which falls back with it as its reason",
    ("trb.sampling.states", "ValueError"): "a sampler that reads more than it reserved is a bug of it",
    ("trb.sampling.vllm.served", "TimeoutError"): "becomes a ServerTimeoutError that names the address",
    ("trb.sampling.vllm.verification", "KeyError"): "a client that asks twice for a record is a bug of it",
    ("trb.training.ranks", "outcome[1]"): "the first process's error, of whatever class, raised on the others",
}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def raised(path: Path) -> Iterator[tuple[int, str]]:
    """(line, what is raised, without its arguments) of every `raise` that names something."""
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Raise) and node.exc is not None:
            yield node.lineno, ast.unparse(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)


def names_in(name: str, path: Path) -> dict[str, object]:
    """What a module's lines can name: what is in it, and what its functions import from the package."""
    names: dict[str, object] = dict(vars(importlib.import_module(name)))
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("trb."):
            source = importlib.import_module(str(node.module))
            names |= {alias.asname or alias.name: getattr(source, alias.name) for alias in node.names}
    return names


def kind_of(text: str, names: dict[str, object]) -> type | None:
    """The class of what `text` raises in a module with these names; a function says it by its annotation."""
    try:
        found = eval(text, dict(names))
    except Exception:
        return None
    if inspect.isroutine(found):
        found = typing.get_type_hints(found).get("return")
    return found if isinstance(found, type) else None


def alternatives(text: str) -> list[str]:
    """`a if c else b` raises either."""
    node = ast.parse(text, mode="eval").body
    return [ast.unparse(part) for part in (node.body, node.orelse)] if isinstance(node, ast.IfExp) else [text]


def strays(name: str, path: Path, names: dict[str, object]) -> list[tuple[str, str, int]]:
    """What a module raises that is neither for people nor unfinished on purpose."""
    found = []
    for line, whole in raised(path):
        for text in alternatives(whole):
            kind = kind_of(text, names)
            if kind is None or not issubclass(kind, TrbError | NotImplementedError):
                found.append((name, text, line))
    return found


def test_every_error_that_is_raised_is_for_people_or_listed_with_a_reason() -> None:
    found = [
        stray
        for name, path in modules()
        if not name.endswith("__main__")
        for stray in strays(name, path, names_in(name, path))
    ]
    assert [stray for stray in found if stray[:2] not in OTHERS] == []
    assert OTHERS.keys() == {stray[:2] for stray in found}, "listed, and raised no more"


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("raise ValueError('x')", "ValueError"),
        ("raise ValueError", "ValueError"),
        ("raise Known('x')", ""),
        ("raise (Known if x else OSError)('x')", "OSError"),
        ("def f():\n    try:\n        g()\n    except KeyError as error:\n        raise error", "error"),
        ("raise made(1)", ""),
        ("raise guessed(1)", "guessed"),
        ("raise Known.of(1)", ""),
        ("try:\n    f()\nexcept ValueError:\n    raise", ""),
        ("raise NotImplementedError", ""),
    ],
)
def test_the_check_sees_every_way_to_raise(tmp_path: Path, source: str, complaint: str) -> None:
    class Known(TrbError):
        @classmethod
        def of(cls, x: int) -> TrbError:
            return cls(x)

    def made(x: int) -> TrbError:
        return TrbError(x)

    def guessed(x: int) -> Exception:
        return TrbError(x)

    (tmp_path / "module.py").write_text(source)
    names = {"Known": Known, "made": made, "guessed": guessed}
    assert [text for _, text, _ in strays("module", tmp_path / "module.py", names)] == (
        [complaint] if complaint else []
    )


def test_errors_for_people() -> None:
    assert is_for_people(TrbError("x"))
    assert is_for_people(PermissionError(errno.EACCES, "Permission denied", "file"))
    for name in ("ENAMETOOLONG", "EFBIG", "EMFILE", "ENFILE", "ESTALE", "ENOSPC"):
        number = getattr(errno, name)
        assert is_for_people(OSError(number, os.strerror(number), "file")), name
    assert is_for_people(torch.OutOfMemoryError("tried to allocate 2 TiB"))
    assert not is_for_people(FileNotFoundError(errno.ENOENT, "No such file or directory", "file"))
    assert not any(map(is_for_people, (ValueError("x"), RuntimeError("x"), OSError("x"), ImportError("x"))))


def test_every_named_error_is_also_what_python_calls_it() -> None:
    """So that `except ValueError` catches it."""

    def below(kind: type) -> Iterator[type]:
        for child in kind.__subclasses__():
            yield child
            yield from below(child)

    own = [kind for kind in below(TrbError) if kind.__module__.startswith("trb.")]
    assert {"ConfigError", "CheckpointError", "DiskFullError"} < {kind.__name__ for kind in own}
    for kind in own:
        assert issubclass(kind, ValueError | RuntimeError | OSError | ImportError), kind


def test_errors_travel_between_processes() -> None:
    for error in (
        UnsupportedModelError(load("student")[0], "why"),
        NonFiniteLogitsError("teacher", 3, 5),
        DiskFullError(errno.ENOSPC, "full"),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
        assert getattr(copy, "errno", None) == getattr(error, "errno", None)
