"""`trb.kernels.building`: built once, kept where nobody else can write, tried before it is loaded, and done without."""

import json
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trb import kernels
from trb.kernels import building

needs_library = pytest.mark.skipif(not kernels.available(), reason="no C compiler, or TRB_NATIVE=0")


# Without one of them `available()` is False, the tests that need the library are skipped, and everything is slow.
@pytest.mark.parametrize("path", [building._HEADER, building._TRIAL, *building._SOURCES], ids=lambda path: path.name)
def test_what_the_build_needs_is_there(path: Path) -> None:
    assert path.is_file()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, compiled once and kept in the folder `cache/native`."""
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRB_CACHE", str(folder / "cache"))
        assert building._load() is not None
    (library,) = (folder / "cache" / "native").iterdir()
    return library


@pytest.fixture
def fast_compiler(built: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds at once what the system's compiler built."""
    monkeypatch.setenv("CC", compiler_that(tmp_path_factory.mktemp("compiler"), "fast", f'cp {built} "$OUT"'))


def test_it_can_be_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(building, "_library", building._library.__wrapped__)
    monkeypatch.setenv("TRB_NATIVE", "0")
    monkeypatch.setenv("TRB_CACHE", str(tmp_path))
    assert not kernels.available()
    with pytest.raises(RuntimeError, match=r"trb\.blend\.solve"):
        kernels.library("trb.blend.solve")
    assert not caplog.records
    assert list(tmp_path.iterdir()) == []


PROBE = """
import logging
logging.basicConfig(level=logging.INFO)
from trb import kernels
print(kernels.available(), kernels.available())
"""


@needs_library
def test_the_library_is_built_once_and_kept_private(built: Path) -> None:
    assert stat.S_IMODE(built.parent.stat().st_mode) == 0o700
    changed = built.stat().st_mtime_ns
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE],
        env={**os.environ, "TRB_CACHE": str(built.parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("True True\n", "")
    assert list(built.parent.iterdir()) == [built]
    assert built.stat().st_mtime_ns == changed


@needs_library
@pytest.mark.usefixtures("fast_compiler")
@pytest.mark.parametrize("open_folder", ["native", "."], ids=["the folder itself", "the folder it is in"])
def test_a_cache_that_others_can_write_is_not_trusted(
    open_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "native").mkdir(mode=0o700)
    (tmp_path / open_folder).chmod(0o777)
    monkeypatch.setenv("TRB_CACHE", str(tmp_path))
    with caplog.at_level(logging.INFO):
        assert building._load() is not None
    assert "can be written by others" in caplog.text
    assert list((tmp_path / "native").iterdir()) == []


@needs_library
@pytest.mark.usefixtures("fast_compiler")
def test_a_sticky_folder_may_hold_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o1777)  # as /tmp, where users share and cannot rename each other's files
    monkeypatch.setenv("TRB_CACHE", str(tmp_path))
    assert building._load() is not None
    assert len(list((tmp_path / "native").iterdir())) == 1


@needs_library
@pytest.mark.usefixtures("fast_compiler")
def test_the_cache_of_another_user_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRB_CACHE", str(tmp_path))
    building._load()
    (theirs,) = (tmp_path / "native").iterdir()
    theirs.unlink()  # this process has it mapped: cut short in place, it would end the process at its exit
    theirs.write_bytes(b"whatever they like")
    monkeypatch.setattr(os, "getuid", lambda: (tmp_path / "native").stat().st_uid + 1)
    with caplog.at_level(logging.INFO):
        assert building._load() is not None
    assert f"{tmp_path / 'native'} belongs to another user" in caplog.text
    assert [path.read_bytes() for path in (tmp_path / "native").iterdir()] == [b"whatever they like"]


# In processes of their own, which a broken library may kill; forked, as importing torch takes seconds.
EACH = """
import json, logging, os, pathlib, sys
from trb import kernels
folder, kinds = pathlib.Path(sys.argv[1]), json.load(sys.stdin)
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger('trb.kernels.building').addHandler(handler)


def alone(function):
    child = os.fork()
    if not child:
        function()
        sys.stdout.flush()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def show():
    found = kernels.available() or kernels.available()  # asked twice, what is wrong is said once
    kept = [path.read_bytes().hex() for path in (cache / "native").glob("*")]
    print(json.dumps([kind, [found, lines, kept]]))


for number, (kind, compiler, content) in enumerate(kinds):
    cache = folder / f"cache-{number}"
    os.environ.update(CC=compiler, TRB_CACHE=str(cache))
    if content is not None:  # a library that was kept, and came to harm since
        alone(kernels.available)
        (kept,) = (cache / "native").iterdir()
        kept.write_bytes(bytes.fromhex(content))
    status = alone(show)
    if status:
        print(json.dumps([kind, f"died with {status}"]), flush=True)
"""


def compiler_that(folder: Path, name: str, script: str) -> str:
    """A compiler that knows its macros and builds what `script` builds; `$OUT` is where the library goes."""
    path = folder / name
    path.write_text(
        f"#!/bin/sh\nHERE={folder}\n"
        'for word; do [ "$last" = -o ] && OUT=$word; last=$word; done\n'
        f'[ -z "$OUT" ] && exec cc "$@"\n{script}\n'
    )
    path.chmod(0o755)
    return str(path)


ODD_COMPILERS = {  # and what must be said of them
    "its own error": (
        "echo 'cc: note' >&2; echo 'blend.c:1: error: unlucky' >&2; exit 1",
        "blend.c:1: error: unlucky",
    ),
    "its messages are in another encoding": (r"printf 'error: \344\377\033[31m' >&2; exit 1", "error: "),
    "it builds nothing": ("true", "does not work"),
    "it builds half a library": ('head -c 4096 "$BUILT" > "$OUT"', "does not"),
    "its library lacks the symbol": ('echo "int x;" | cc -shared -fPIC -x c -o "$OUT" -', "solve_rows"),
    "its library crashes": (
        'echo "int solve_rows(void) { return *(volatile int *)8; }" | cc -shared -fPIC -x c -o "$OUT" -',
        "does not work (status -11)",
    ),
    "its library writes nothing": (
        'echo "int solve_rows(void) { return 0; }" | cc -shared -fPIC -x c -o "$OUT" -',
        "wrong answers",
    ),
    "its logarithms are off by a thousandth": ('cc -include "$HERE/off.h" "$@"', "wrong answers"),
    "it is killed": ("kill -9 $$", "failed with status -9"),
}
NO_COMPILERS = ["/bin/false", "/no/such/compiler", "cc 'unclosed", "''", "cc \udcff", "/", "cc -no-such-option"]


def damaged(whole: bytes) -> dict[str, bytes]:
    return {
        "emptied": b"",
        "halved": whole[: len(whole) // 2],
        "a page short": whole[:-4096],
        "zeros at the end, as after a power loss": whole[:4096] + bytes(len(whole) - 4096),
        "one bit flipped": whole[:1000] + bytes([whole[1000] ^ 4]) + whole[1001:],
        "flipped all over": whole[:64] + bytes(255 - byte for byte in whole[64:]),
        "no library": b"#!/bin/sh\n",
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Of each kind: whether there are kernels, what was logged, and what is in the cache (hexadecimal)."""
    folder = tmp_path_factory.mktemp("each")
    kinds: list[tuple[str, str, str | None]] = [(named, named, None) for named in NO_COMPILERS]
    if kernels.available():
        built = request.getfixturevalue("built")
        (folder / "off.h").write_text("#include <math.h>\n#define log(x) (1.001 * (log)(x))\n")
        for number, (kind, (script, _)) in enumerate(ODD_COMPILERS.items()):
            compiler = compiler_that(folder, f"compiler-{number}", f"BUILT={built}\n{script}")
            kinds.append((kind, compiler, None))
        fast = compiler_that(folder, "fast", f'cp {built} "$OUT"')
        kinds += [(kind, fast, content.hex()) for kind, content in damaged(built.read_bytes()).items()]
    done = subprocess.run(
        [sys.executable, "-c", EACH, str(folder)],
        env={**os.environ, "TRB_NATIVE": "1"},
        input=json.dumps(kinds),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return dict(map(json.loads, done.stdout.splitlines()))


@needs_library
def test_a_damaged_library_is_built_again(built: Path, found: dict[str, Any]) -> None:
    whole = built.read_bytes()
    assert {kind: found[kind] for kind in damaged(whole)} == {
        kind: [True, [], [whole.hex()]] for kind in damaged(whole)
    }


def said_once(found: Any) -> str:
    """The one line of a compiler that gave no kernels."""
    there, lines, kept = found
    assert not there
    (line,) = lines
    assert line.startswith("computing with torch operations")
    assert kept == []  # no other process meets it either
    return str(line)


@needs_library
@pytest.mark.parametrize("kind", ODD_COMPILERS)
def test_what_an_odd_compiler_builds_is_not_loaded(kind: str, found: dict[str, Any]) -> None:
    line = said_once(found[kind])
    assert ODD_COMPILERS[kind][1] in line
    assert line.isprintable()


@pytest.mark.parametrize("named", NO_COMPILERS)
def test_any_value_of_cc_is_survived_and_reported_once(named: str, found: dict[str, Any]) -> None:
    line = said_once(found[named])
    assert not named.startswith("/") or named in line


@needs_library
@pytest.mark.usefixtures("fast_compiler")
def test_a_user_without_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRB_CACHE", "~nobody-of-this-name/cache")
    assert building._load() is not None
