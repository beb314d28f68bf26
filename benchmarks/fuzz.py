"""Runs the properties of tests/security/test_fuzz.py for longer: by coverage under atheris, else as hypothesis draws.

    python benchmarks/fuzz.py --seconds 60
    python benchmarks/fuzz.py --seconds 600 --only test_reports

Every property gets a process of its own for so many seconds. atheris is looked for as any module is; `make fuzz`
installs it beside the virtual environment, since it replaces allocators and signal handlers. Corpora stay in
.fuzz/corpus and are not committed: what is found becomes an `@example` of the property, and a fix.

Left out on purpose: the property that talks to the grading process, which coverage of this process cannot guide.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / ".fuzz" / "corpus"


def properties() -> dict[str, Any]:
    """Name -> hypothesis test, of those that need no fixture."""
    path = ROOT / "tests" / "security" / "test_fuzz.py"
    spec = importlib.util.spec_from_file_location("test_fuzz", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {name: test for name, test in vars(module).items() if name.startswith("test_")}
    return {name: test for name, test in found.items() if "verifier" not in test.hypothesis.inner_test.__annotations__}


def guided(name: str, seconds: int) -> None:
    """Fuzz one property in this process, and end it: atheris does not return."""
    import atheris

    with atheris.instrument_imports(include=["trb"]):
        test = properties()[name]
    corpus = CORPUS / name
    corpus.mkdir(parents=True, exist_ok=True)
    limits = [f"-max_total_time={seconds}", "-rss_limit_mb=4096", "-timeout=60", "-verbosity=0", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], str(corpus), *limits, f"-artifact_prefix={corpus}/"], test.hypothesis.fuzz_one_input)
    atheris.Fuzz()


def drawn(name: str, seconds: int) -> int:
    """Let hypothesis draw examples of one property until the time is over; returns the exit code of the last round."""
    environment = os.environ | {"TRB_FUZZ_EXAMPLES": "1000"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/security/test_fuzz.py::{name}"]
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return 0  # no counterexample in the time it had


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the readers of other people's files.")
    parser.add_argument("--seconds", type=int, default=60, metavar="N", help="per property (default: 60)")
    parser.add_argument("--only", metavar="NAME", help="one property")
    parser.add_argument("--guided", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.guided:
        guided(options.only, options.seconds)
    names = [options.only] if options.only else list(properties())
    has_atheris = importlib.util.find_spec("atheris") is not None
    print("guided by coverage (atheris)" if has_atheris else "atheris is not installed: drawn by hypothesis alone")
    failed = []
    for name in names:
        print(f"{name}: {options.seconds} s", flush=True)
        if has_atheris:
            command = [sys.executable, __file__, "--guided", "--only", name, "--seconds", str(options.seconds)]
            code = subprocess.run(command, cwd=ROOT).returncode
        else:
            code = drawn(name, options.seconds)
        failed += [name] if code else []
    print(f"counterexamples: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
