"""The wheel: built from the sources as a user's pip would, it holds every data file and works from anywhere."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]
BUILD_INPUTS = ("pyproject.toml", "README.md", "LICENSE", "src")


def has_build_backend() -> bool:
    if importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None:
        return False
    return Version(importlib.metadata.version("setuptools")) >= Version("77")


pytestmark = pytest.mark.skipif(not has_build_backend(), reason="needs pip and setuptools>=77 to build a wheel")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, built in a copy: building in place leaves files behind."""
    source = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in BUILD_INPUTS:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=ignore)
        else:
            shutil.copy(path, source / name)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    result = subprocess.run(
        [*command, "--wheel-dir", str(target), str(source)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return next(target.glob("trb-*.whl"))


def test_it_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    package = ROOT / "src" / "trb"
    files = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    expected = {path.relative_to(package.parent).as_posix() for path in files}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == expected
    assert any(name.endswith(".safetensors") for name in packed)


def test_its_metadata_names_the_command_the_licence_and_the_python(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    assert "trb = trb.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
    metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`trb` as pip installs it from the wheel, in an environment of its own that borrows the dependencies of this one.

    The checkout is not among them: what an editable install adds to the path stands in a .pth file, which is read in
    the first folder of packages alone.
    """
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment)
    python = environment / "bin" / "python"
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    result = subprocess.run(pip, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return environment / "bin" / "trb"


FEW = ["--max-steps", "2", "--train-limit", "16", "--prompts-per-step", "2", "--per-device-train-batch-size", "8"]
FEW += ["--eval-limit", "4", "--quiet"]
# One process for all that load the models: each of its own would spend five seconds on imports.
LOADED = f"""\
import trb
from trb.cli import main
from trb.models.loading import load_model, load_tokenizer
from trb.studies import provenance

print(trb.__file__)
load_model("zoo:student")
assert load_tokenizer("zoo:student").eos_token_id is not None
assert provenance.describe()["commit"] is None
few = {FEW!r}
for arguments in (
    ["compare", "--config", "quickstart", *few],
    ["train", "--config", "distil.yaml", *few],
    ["eval", "--model", "runs/distil", "--data", "zoo:chains", "--limit", "4", "--max-new-tokens", "48", "--quiet"],
    ["report", "runs/distil"],
):
    assert main(arguments) == 0, arguments
"""


def test_the_first_commands_of_a_new_user_run_in_an_empty_directory(command: Path, tmp_path: Path) -> None:
    """Without the checkout: neither the working directory nor the environment lends a hand."""
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*words: str) -> str:
        result = subprocess.run(words, cwd=tmp_path, env=surroundings, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, (words, result.stdout, result.stderr)
        return result.stdout

    run(str(command), "init")
    found = run(str(command.with_name("python")), "-c", LOADED).splitlines()[0]
    assert Path(found).is_relative_to(command.parents[1])
    assert {path.name for path in tmp_path.iterdir()} == {"distil.yaml", "runs"}
    for name in ("quickstart", "distil"):
        assert (tmp_path / "runs" / name / "report.html").is_file()
