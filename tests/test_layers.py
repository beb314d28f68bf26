"""The package's own rules about imports: one direction between layers, none of them slow or with side effects."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trb

PACKAGE = Path(trb.__file__).parent
# The rooms, in the order of docs/architecture.md: each may import only from those before it, and inside a room nothing
# imports in a circle.
LAYERS = (
    "errors",
    "safety",
    "measures",
    "records",
    "kernels",
    "blend",
    "schedule",
    "vocab",
    "policies",
    "losses",
    "zoo",
    "models",
    "sampling",
    "tools",
    "training",
    "tasks",
    "planning",
    "studies",
    "report",
    "cli",
)


def module_files(package: Path) -> Iterator[tuple[str, Path]]:
    """(layer, file) of every module in a package, without the package root: it re-exports lazily."""
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts not in (("__init__",), ("__main__",)):
            yield parts[0], path


def is_type_checking(node: ast.AST) -> bool:
    if not isinstance(node, ast.If):
        return False
    return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import under a node, inside functions too; what only a type checker reads is left out."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    children = node.orelse if is_type_checking(node) else ast.iter_child_nodes(node)  # type: ignore[attr-defined]
    for child in children:
        yield from imports(child)


def imported_layers(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """(line, layer) of every layer that a file imports; relative and absolute spellings alike."""
    name = package.name
    here = [name, *path.relative_to(package).parts[:-1]]
    for node in imports(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            base = here[: len(here) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            modules = [f"{source}.{alias.name}" for alias in node.names]
        for module in modules:
            parts = module.split(".")
            if parts[0] == name and len(parts) > 1 and is_module(package, parts[1]):
                yield node.lineno, parts[1]


def is_module(package: Path, name: str) -> bool:
    return (package / f"{name}.py").is_file() or (package / name).is_dir()


def violations(package: Path, layers: tuple[str, ...] = LAYERS) -> list[str]:
    order = {layer: rank for rank, layer in enumerate(layers)}
    found = []
    for layer, path in module_files(package):
        if layer not in order:
            found.append(f"{path.relative_to(package)}: {layer} is no known layer")
            continue
        for line, target in imported_layers(path, package):
            if order.get(target, len(order)) > order[layer]:
                found.append(f"{path.relative_to(package)}:{line}: {layer} imports {target}, a later layer")
    return found


def test_imports_go_one_way() -> None:
    assert violations(PACKAGE) == []


def imported_modules(path: Path, package: Path) -> Iterator[str]:
    """Dotted names of every module of the package that a file imports, inside functions too."""
    for node in imports(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] != package.name:
                continue
            for length in range(len(parts), 1, -1):
                place = package.joinpath(*parts[1:length])
                if place.with_suffix(".py").is_file() or (place / "__init__.py").is_file():
                    yield ".".join(parts[:length])
                    break


def circles(package: Path) -> list[list[str]]:
    """Groups of modules that import each other."""
    names = {}
    for path in package.rglob("*.py"):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        names[".".join(parts).removesuffix(".__init__")] = path
    edges = {name: set(imported_modules(path, package)) - {name} for name, path in names.items()}
    reach = {name: set(targets) for name, targets in edges.items()}
    for _ in names:
        grown = {name: found.union(*(reach.get(target, set()) for target in found)) for name, found in reach.items()}
        if grown == reach:
            break
        reach = grown
    looping = sorted(name for name in names if name in reach[name])
    return [
        sorted(other for other in looping if other in reach[name])
        for name in looping
        if name == min(other for other in looping if other in reach[name] and name in reach[other])
    ]


def test_no_modules_import_in_a_circle() -> None:
    assert circles(PACKAGE) == []


def test_the_check_sees_a_circle(tmp_path: Path) -> None:
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name, source in (("a", "from pkg.b import f"), ("b", "def f():\n    import pkg.c"), ("c", "from pkg import a")):
        (package / f"{name}.py").write_text(source)
    (package / "d.py").write_text("from pkg import a")
    assert circles(package) == [["pkg.a", "pkg.b", "pkg.c"]]


def test_modules_are_small_and_few_are_at_the_root() -> None:
    long = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: lines for name, lines in long.items() if lines > 500} == {}
    assert len(list(PACKAGE.glob("*.py"))) <= 10


# Whose `__all__` is for people, who may import what nothing here does.
PUBLIC = {
    *("trb", "trb.blend", "trb.losses", "trb.planning", "trb.policies", "trb.sampling", "trb.sampling.vllm"),
    *("trb.schedule", "trb.vocab", "trb.zoo"),
}


def listed(package: Path) -> dict[str, set[str]]:
    """`__all__` of every module that has one."""
    found = {}
    for path in package.rglob("*.py"):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                found[".".join(parts).removesuffix(".__init__")] = set(ast.literal_eval(node.value))
    return found


def imported_names(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of what a file imports by name, or reads as an attribute of a module that it imports."""
    tree = ast.parse(path.read_text(), filename=str(path))
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield node.module, alias.name
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            modules |= {alias.asname: alias.name for alias in node.names if alias.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield modules[node.value.id], node.attr


def unlisted(package: Path) -> list[str]:
    """What one module imports from another that does not list it."""
    lists = listed(package)
    return sorted(
        f"{path.relative_to(package)}: {module}.{name}"
        for path in package.rglob("*.py")
        for module, name in set(imported_names(path))
        if name not in lists.get(module, {name})
        and not name.startswith("_")
        and not is_module(package.parent, f"{module}.{name}".replace(".", "/"))
    )


def test_what_modules_import_of_each_other_is_listed() -> None:
    assert unlisted(PACKAGE) == []


def test_what_is_listed_is_used_elsewhere() -> None:
    """Classes aside, of which others hold objects, and what the documents show."""
    root = Path(__file__).parents[1]
    files = [
        path for folder in (PACKAGE, *map(root.joinpath, ("tests", "benchmarks"))) for path in folder.rglob("*.py")
    ]
    used = {found for path in files for found in imported_names(path)}
    shown = set(re.findall(r"\w+", "".join(page.read_text() for page in (root / "docs").glob("*.md"))))
    idle = [
        f"{module}.{name}"
        for module, names in listed(PACKAGE).items()
        for name in names
        if module not in PUBLIC
        and (module, name) not in used
        and name not in shown
        and not isinstance(getattr(importlib.import_module(module), name), type)
    ]
    assert sorted(idle) == []


def test_the_check_sees_what_is_not_listed(tmp_path: Path) -> None:
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("__all__ = ['f']\nf = g = h = _i = 0\n")
    (package / "b.py").write_text("from pkg import a\nfrom pkg.a import f, g, _i\nprint(a.h, a.f)\n")
    assert unlisted(package) == ["b.py: pkg.a.g", "b.py: pkg.a.h"]


def long_functions(source: str, most: int = 60) -> list[str]:
    """Functions with more lines than that, docstrings not counted, and no reason in a comment above."""
    found, lines = [], source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[0]
        said = first.end_lineno - first.lineno + 1 if ast.get_docstring(node, clean=False) is not None else 0  # type: ignore[operator]
        length = node.end_lineno - node.lineno + 1 - said  # type: ignore[operator]
        above = min(part.lineno for part in (node, *node.decorator_list)) - 2
        explained = above >= 0 and re.match(r"\s*# long because \w", lines[above])
        if length > most and not explained:
            found.append(f"{node.name} has {length} lines")
    return found


def test_functions_are_short_or_say_why_not() -> None:
    long = {str(path.relative_to(PACKAGE)): long_functions(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert {name: found for name, found in long.items() if found} == {}


def test_the_check_sees_long_functions() -> None:
    body = "    x = 1\n" * 3
    documented = 'def f():\n    """A\n    B\n    C"""\n    x = 1\n    x = 2\n'
    assert long_functions("def f():\n" + body, most=3) == ["f has 4 lines"]
    assert long_functions("def f():\n" + body, most=4) == []
    assert long_functions(documented, most=3) == []
    assert long_functions(documented, most=2) == ["f has 3 lines"]
    assert long_functions("# long because of x\n@g\ndef f():\n" + body, most=3) == []
    assert long_functions("# long because\n\ndef f():\n" + body, most=3) == ["f has 4 lines"]
    indented = "class A:\n    # long because of x\n    async def f():\n        x = 1\n        x = 2\n"
    assert long_functions(indented, most=2) == []
    assert long_functions(indented.replace("# long because of x", "x: int"), most=2) == ["f has 3 lines"]


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("from pkg import high", "imports high"),
        ("from pkg.high import f", "imports high"),
        ("import pkg.high.deep as d", "imports high"),
        ("def f():\n    from pkg.high import g", "imports high"),
        ("class A:\n    def f(self):\n        if True:\n            import pkg.high", "imports high"),
        ("from . import high", "imports high"),
        ("from .high import f", "imports high"),
        ("try:\n    import pkg.high\nexcept ImportError:\n    pass", "imports high"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import pkg.high", "imports high"),
        ("from pkg import stray", "imports stray"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pkg.high import f", ""),
        ("from pkg import __version__", ""),
        ("import highs, pkg", ""),
        ("from pkg.low import f", ""),
    ],
)
def test_the_check_sees_every_kind_of_import(tmp_path: Path, source: str, complaint: str) -> None:
    package = tmp_path / "pkg"
    (package / "high").mkdir(parents=True)
    (package / "__init__.py").write_text("def f():\n    from pkg import high\n")
    (package / "high" / "__init__.py").write_text("from pkg import low\nfrom . import deep\n")
    (package / "high" / "deep.py").write_text("from ..low import f\nfrom .deeper import g\n")
    (package / "low.py").write_text(source)
    if complaint == "imports stray":
        (package / "stray.py").write_text("")
    found = [line for line in violations(package, ("low", "high")) if line.startswith("low.py")]
    assert (len(found) == 1 and complaint in found[0]) if complaint else not found


def test_the_check_reports_a_module_of_no_layer(tmp_path: Path) -> None:
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "stray.py").write_text("")
    assert violations(package, ("low",)) == ["stray.py: stray is no known layer"]


def run_isolated(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


NO_SOCKETS = """
import socket, sys, time
class Refused(socket.socket):
    def __init__(self, *args, **kwargs):
        raise AssertionError("opened a socket")
def refuse(*args, **kwargs):
    raise AssertionError("looked up a name or opened a connection")
socket.socket = Refused
socket.create_connection = socket.getaddrinfo = refuse
start = time.process_time()
"""


def test_the_socket_guard_works() -> None:
    with pytest.raises(AssertionError, match="opened a socket"):
        run_isolated(NO_SOCKETS + "socket.socket()")


# What Windows lacks, missing to the package alone: the libraries below it look for themselves.
NO_UNIX = """
import builtins, importlib, pkgutil, sys
imported = builtins.__import__
def refuse(name, globals=None, *rest, **more):
    if name in {'fcntl', 'resource', 'termios'} and str((globals or {}).get('__name__')).partition('.')[0] == 'trb':
        raise ImportError(name)
    return imported(name, globals, *rest, **more)
builtins.__import__ = refuse
"""


def test_importing_is_quick_and_opens_no_socket_and_no_module_needs_what_only_unix_has() -> None:
    run_isolated(
        f"{NO_SOCKETS}{NO_UNIX}import trb\n"
        # Beside what it stands on, in processor time: a slow or busy machine is slow at both. It is a tenth.
        "import datasets, peft\nfrom transformers import Trainer\nfrom trl import DistillationTrainer\n"
        "below = time.process_time()\n"
        "from trb import TRBConfig, TRBTrainer\n"
        "assert (taken := time.process_time() - below) < (below - start) / 2, (taken, below - start)\n"
        "names = [module.name for module in pkgutil.walk_packages(trb.__path__, 'trb.')]\n"
        "assert len(names) > 60, names\n"
        "for name in names:\n"
        "    if not name.endswith('__main__'): importlib.import_module(name)"
    )


def test_the_check_for_what_only_unix_has_works() -> None:
    with pytest.raises(AssertionError, match="ImportError: fcntl"):
        run_isolated(NO_UNIX + "__name__ = 'trb.pretended'\nimport fcntl")


@pytest.mark.parametrize("module", ["trb", "trb.blend", "trb.schedule", "trb.policies"])
def test_the_mathematics_needs_neither_trl_nor_transformers(module: str) -> None:
    heavy = "{'trl', 'transformers', 'accelerate', 'datasets'} & sys.modules.keys()"
    run_isolated(f"import sys, {module}\nloaded = {heavy}\nassert not loaded, loaded")


def test_a_configuration_needs_no_trainer() -> None:
    run_isolated(
        "import sys, trb.studies.keys\nfrom trb import TRBConfig\nassert 'trb.training.trainer' not in sys.modules"
    )


def test_the_package_root_offers_the_trainer_and_nothing_unknown() -> None:
    assert {"TRBConfig", "TRBTrainer", "__version__"} == set(dir(trb))
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        _ = trb.Nonsense
