"""What produced a result: the command, the code, the versions and the machine, written beside every result.

Left out on purpose: the configuration, which has its own file, and anything that needs the network.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

import trb
from trb.records import PROVENANCE
from trb.safety.secrets import redact

__all__ = ["describe", "write"]

_PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft")
GIT_TIMEOUT_S = 10


def describe() -> dict[str, Any]:
    """The origin of a result, ready for JSON.

    Keys: command (secrets redacted); commit and dirty, as they were when this process first asked, which is the code
    that it runs (both None unless that lies in its git checkout; dirty means that the package's files differ from the
    commit); versions; python; machine (platform, cpu, cpu_capability, cores, memory_gb, gpus); time (ISO 8601, UTC).
    """
    commit, dirty = _git_state(Path(trb.__file__).parent)
    return {
        "command": f"{_program(sys.argv[0])} {redact(sys.argv[1:])}".rstrip(),
        "commit": commit,
        "dirty": dirty,
        "versions": {"trb": trb.__version__} | {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "machine": _machine(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write(directory: str | Path, models: Mapping[str, str] | None = None) -> Path:
    """Write `describe()` to provenance.json in a directory, made if missing, atomically; returns the file.

    `models` says what tells each model from another at its place (`trb.models.identity`), by its spec.
    """
    directory = Path(directory)
    target = directory / PROVENANCE
    PROVENANCE.write(target, describe() | ({"models": dict(models)} if models else {}))
    return target


def _program(path: str) -> str:
    """How a reader would start the program: where it is installed on this machine says nothing."""
    program = Path(path)
    return f"python -m {program.parent.name}" if program.name == "__main__.py" else program.name


@cache
def _git_state(package: Path) -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the checkout a package directory belongs to; (None, None) outside one."""
    # An installed copy may lie inside somebody else's repository, which knows nothing about these files.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    commit, changes = _git(package, "rev-parse", "HEAD"), _git(package, "status", "--porcelain", "--", ".")
    return commit, None if changes is None else bool(changes)


def _git(directory: Path, *arguments: str) -> str | None:
    """Output of a git command, or None when it fails, git is missing or it takes too long."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        result = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            env=environment | {"GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        # Which vector instructions torch uses: with others sums round differently, and a long training ends elsewhere.
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
