"""Provenance: what it says, what it must not say, and that it never describes somebody else's repository."""

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path

import pytest
import torch
import transformers

import trb
from trb.safety.secrets import redact
from trb.studies import provenance

GIT_IDENTITY = {f"GIT_{role}_{part}": "t@example.org" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}


def git(directory: Path, *arguments: str) -> str:
    environment = os.environ | GIT_IDENTITY
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with one commit that holds a package, which describe() takes for its own."""
    package = tmp_path / "repository" / "src" / "trb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git(tmp_path, "init", "--quiet", "repository")
    git(package, "add", ".")
    git(package, "commit", "--quiet", "--message", "first")
    monkeypatch.setattr(trb, "__file__", str(package / "__init__.py"))
    return package


def test_versions_machine_and_time_are_those_of_this_process() -> None:
    described = provenance.describe()
    assert described["python"] == platform.python_version()
    assert described["versions"]["trb"] == trb.__version__
    assert described["versions"]["torch"] == metadata.version("torch")
    assert described["versions"]["transformers"] == transformers.__version__
    assert described["machine"]["cores"] == os.cpu_count()
    assert described["machine"]["cpu"]
    assert 0.1 < described["machine"]["memory_gb"] < 1e5
    assert len(described["machine"]["gpus"]) == torch.cuda.device_count()
    age = datetime.now(UTC) - datetime.fromisoformat(described["time"])
    assert timedelta(seconds=-1) < age < timedelta(minutes=1)


def test_the_vector_instructions_are_those_that_torch_uses() -> None:
    """Not those that the processor has: runs of one processor with others do not end at the same numbers."""
    code = "from trb.studies.provenance import describe; print(describe()['machine']['cpu_capability'])"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "DEFAULT"


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_PACKAGES", ("no-such-package-anywhere",))
    assert provenance.describe()["versions"] == {"trb": trb.__version__, "no-such-package-anywhere": None}


def test_a_checkout_is_named_by_its_commit(checkout: Path) -> None:
    described = provenance.describe()
    assert described["commit"] == git(checkout, "rev-parse", "HEAD")
    assert described["dirty"] is False


def test_a_commit_made_while_the_process_runs_is_not_what_it_runs(checkout: Path) -> None:
    before = provenance.describe()
    (checkout / "__init__.py").write_text("x = 1\n")
    git(checkout, "commit", "--quiet", "--all", "--message", "second")
    after = provenance.describe()
    assert (after["commit"], after["dirty"]) == (before["commit"], False)
    assert after["commit"] != git(checkout, "rev-parse", "HEAD")


@pytest.mark.parametrize("name", ["__init__.py", "new_module.py"])
def test_changed_and_new_modules_make_it_dirty(checkout: Path, name: str) -> None:
    (checkout / name).write_text("x = 1\n")
    assert provenance.describe()["dirty"] is True


def test_results_beside_the_package_do_not_make_it_dirty(checkout: Path) -> None:
    (checkout.parent / "runs").mkdir()
    (checkout.parent / "runs" / "results.json").write_text("{}")
    assert provenance.describe()["dirty"] is False


def test_an_installed_copy_inside_another_repository_has_no_commit(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = checkout.parent / ".venv" / "trb"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    monkeypatch.setattr(trb, "__file__", str(installed / "__init__.py"))
    assert (provenance.describe()["commit"], provenance.describe()["dirty"]) == (None, None)


def test_git_variables_of_a_hook_do_not_redirect_it(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = git(checkout, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert provenance.describe()["commit"] == expected


def test_without_git_there_is_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert provenance.describe()["commit"] is None


def test_a_git_that_hangs_is_given_up(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = tmp_path / "bin" / "git"
    stuck.parent.mkdir()
    stuck.write_text("#!/bin/sh\nexec sleep 60\n")
    stuck.chmod(0o755)
    monkeypatch.setenv("PATH", str(stuck.parent), prepend=os.pathsep)
    monkeypatch.setattr(provenance, "GIT_TIMEOUT_S", 0.2)
    assert provenance.describe()["commit"] is None


@pytest.mark.parametrize(
    ("arguments", "secret"),
    [
        (["--hub-token", "plain"], "plain"),
        (["--hub_token=plain"], "plain"),
        (["hub_token=plain"], "plain"),
        (["trainer.api_key=plain=with=signs"], "with"),
        (["--password", "plain"], "plain"),
        (["--wandb-key", "plain"], "plain"),
        (["--model", "hf_" + "aB3" * 11], "aB3aB3"),
        (["--note", "see ghp_" + "a1" * 18], "a1a1"),
        (["--note", "sk-proj-" + "x9" * 12], "x9x9"),
        (["https://me:hunter2@example.org/model"], "hunter2"),
        (["--index=https://me:hunter2@example.org"], "hunter2"),
        (["--entity", "0123456789abcdef0123456789abcdef01234567"], "89abcdef"),
        (["--header", "eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl"], "c2lnbmF0"),
    ],
)
def test_secrets_are_redacted(arguments: list[str], secret: str) -> None:
    shown = redact(["trb", *arguments])
    assert secret not in shown
    assert "[redacted]" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config", "quickstart", "--max-new-tokens", "512"],
        ["eos_token_id=151645", "--teacher-top-k=25"],
        ["--output", "runs/skd-teacher-top-k-25-temperature-0.6-seed-0"],
        ["--revision", "0123456789abcdef0123456789abcdef01234567"],
        ["--token-mean", "--seed", "1"],
        ["Qwen/Qwen3-1.7B-Base", "a b", "https://example.org/a@b"],
    ],
)
def test_ordinary_arguments_stay_as_they_are(arguments: list[str]) -> None:
    assert shlex.split(redact(arguments)) == arguments


def test_the_program_is_named_without_the_place_it_is_installed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/someone/.venv/bin/trb", "compare", "--config", "quickstart"])
    assert provenance.describe()["command"] == "trb compare --config quickstart"
    monkeypatch.setattr(sys, "argv", ["/home/someone/src/trb/__main__.py", "train"])
    assert provenance.describe()["command"] == "python -m trb train"


def test_the_command_is_the_one_that_started_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["trb", "train", "--hub-token", "plain", "a b"])
    assert provenance.describe()["command"] == "trb train --hub-token '[redacted]' 'a b'"


def test_write_replaces_the_file_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "run"
    assert provenance.write(target) == target / "provenance.json"
    (target / "provenance.json").write_text("old")
    provenance.write(str(target))
    assert json.loads((target / "provenance.json").read_text())["versions"]["trb"] == trb.__version__
    assert [path.name for path in target.iterdir()] == ["provenance.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provenance.write(tmp_path)
    before = (tmp_path / "provenance.json").read_bytes()
    monkeypatch.setattr(provenance, "describe", lambda: {"not": {"json"}})
    with pytest.raises(TypeError):
        provenance.write(tmp_path)
    assert (tmp_path / "provenance.json").read_bytes() == before


def test_nothing_touches_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    provenance.describe()
