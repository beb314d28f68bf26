"""Writes requirements.lock: what the package needs at run time, with the hashes of every published file.

    python benchmarks/lock.py PATH/TO/pip-compile

Left out on purpose: torch. Which of its builds fits depends on the machine, and one hash would fit one of them.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = """\
# What the package needs at run time, every version pinned and every published file hashed. After torch is installed:
#   pip install --no-deps --require-hashes -r requirements.lock
# Resolved for Linux. torch is left out: which of its builds fits depends on the machine; constraints.txt pins it.
# `make lock` writes this file anew, `make audit` looks its versions up in the database of known vulnerabilities.
"""
OPTIONS = (
    "--quiet --generate-hashes --allow-unsafe --strip-extras --no-header --no-annotate --no-emit-find-links "
    "--no-emit-index-url --no-emit-options --constraint constraints.txt pyproject.toml"
)


def without(name: str, text: str) -> str:
    """The pinned requirements of `text`, each with its hashes, but the one called `name`."""
    blocks = re.findall(r"(?m)^[A-Za-z0-9][^\n]*==[^\n]*\n(?:[ \t]+[^\n]*\n)*", text)
    return "".join(block for block in blocks if not block.startswith(f"{name}=="))


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "requirements.txt"
        command = [sys.argv[1], *OPTIONS.split(), "--output-file", str(written)]
        subprocess.run(command, cwd=ROOT, check=True)
        (ROOT / "requirements.lock").write_text(HEADER + without("torch", written.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
