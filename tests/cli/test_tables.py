"""Tables of the terminal: no number of theirs is cut in 80 columns."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from trb.cli.display import score_table, study_table

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
METHODS = ("opd", "trb", "sequence-linear", "veto")


def shown(table: Any) -> str:
    output = io.StringIO()
    Console(file=output, width=80, force_terminal=False).print(table)
    return output.getvalue()


@pytest.mark.parametrize("key", ["pass_at_1", "reverse_kl"])
def test_scores_fit_into_80_columns(key: str) -> None:
    score = {key: 0.97531, "interval": [0.96421, 0.98642], "mean_length": 512.0, "stop_rate": 1.0}
    score |= {"student_entropy": 1.234, "teacher_log_prob": -1.744}
    text = shown(score_table(dict.fromkeys(("student", *METHODS, "teacher"), score)))
    assert "…" not in text
    assert "0.964 to 0.986" in text if key == "reverse_kl" else "96.4 to 98.6" in text


@pytest.mark.parametrize("key", ["pass_at_1", "reverse_kl"])
def test_what_rounds_to_zero_has_no_sign(key: str) -> None:
    tiny = {"estimate": -1e-6, "interval": [-2e-6, 1e-6], "p_value_holm": 1.0}
    score = {key: 0.5, "interval": [-1e-6, 0.5], "mean_length": 5.0, "stop_rate": 1.0, "seeds": 2, "problems": 9}
    methods = {"opd": {**score, "difference_to_opd": None}, "trb": {**score, "difference_to_opd": tiny}}
    study = {"title": "t", "measure": key, "student": score, "teacher": score, "methods": methods}
    text = shown(study_table(study)) + shown(score_table({"student": score, "trb": {**score, key: 0.5 - 1e-6}}))
    assert not re.search(r"[-+]0\.0+(?!\d)", text)
    assert "0.0 to 50.0" in text or "0.000 to 0.500" in text


@pytest.mark.parametrize("name", ["dialogue-study", "study2", "code-study"])
def test_studies_fit_into_80_columns(name: str) -> None:
    for setting in json.loads((RESULTS / f"{name}.json").read_text())["settings"].values():
        text = shown(study_table(setting))
        assert "…" not in text
        assert all(method in text for method in setting["methods"])
