"""Packages that options ask for: a missing one is one line with pip's command, before any model is loaded."""

from pathlib import Path
from typing import Any

import pytest
from small_recipes import SMALL_FILE
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from trb import TRBConfig
from trb.cli import main
from trb.studies import comparison, material, packages
from trb.studies.packages import REPORTERS, missing_packages

OURS = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without any optional package, in which loading a model would be a mistake."""

    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    for name in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(material, name, loaded)


def test_every_service_of_transformers_is_known() -> None:
    assert REPORTERS.keys() == INTEGRATION_TO_CALLBACK.keys()


@pytest.mark.parametrize("name", sorted(INTEGRATION_TO_CALLBACK))
@pytest.mark.parametrize("command", ["train", "compare", "doctor"])
def test_a_service_that_is_not_installed(
    command: str, name: str, bare: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not REPORTERS[name][0]:
        pytest.skip("it needs no package")
    (tmp_path / "small.yaml").write_text(SMALL_FILE + ("methods: {opd: {}, trb: {}}\n" if command == "compare" else ""))
    words = [command, "--config", str(tmp_path / "small.yaml"), "--report-to", name]
    if command == "doctor":
        with pytest.raises(AssertionError, match="a model is loaded"):  # what it goes on with
            main(words)
        [said] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fail packages")]
    else:
        assert main([*words, "--output-dir", str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("error: ")
        assert not (tmp_path / "run").exists()
    assert f"report_to: {name} needs " in said
    assert f"pip install {REPORTERS[name][1]}" in said


@pytest.mark.parametrize("name", [each.value for each in OptimizerNames])
def test_optimizers(name: str, bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    args = TRBConfig("unused", report_to=[])
    args.optim = OptimizerNames(name)
    missing = missing_packages(args)
    if name in OURS:
        assert missing == []
    else:
        assert len(missing) == 1 and missing[0].startswith(f"optim: {name} needs ") and ": pip install " in missing[0]
    monkeypatch.setattr(packages, "find_spec", lambda module: module)
    assert missing_packages(args) == []


@pytest.mark.parametrize("name", ["use_vllm", "use_liger_kernel", "deepspeed"])
def test_engines_and_kernels(name: str, bare: None) -> None:
    args = TRBConfig("unused", report_to=[])
    setattr(args, name, True)
    [said] = missing_packages(args)
    assert said.startswith(f"{name} needs ") and ": pip install " in said


def test_one_of_a_comparisons_methods_is_enough(
    bare: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found before anything is scored."""
    monkeypatch.setattr(comparison, "scores_before", None)
    (tmp_path / "several.yaml").write_text(SMALL_FILE + "methods: {opd: {}, trb: {optim: lion_8bit}}\n")
    assert main(["compare", "--config", str(tmp_path / "several.yaml"), "--output-dir", str(tmp_path / "run")]) == 2
    assert "pip install bitsandbytes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
