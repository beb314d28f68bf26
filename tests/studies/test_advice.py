"""Advice says what its table and the outlook say, and no more."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyPair
from id_subject import id_subject

from trb.studies.advice import TABLE, advise, outlook
from trb.training.behaviors import budget_schedule_of
from trb.training.config import TRBConfig


def a_table(slope: float = -0.5, intercept: float = 0.5, error: float = 0.05) -> dict[str, Any]:
    line = {"slope": slope, "intercept": intercept, "error": error}
    points = [{"pair": "a", "cosine": 0.2, "gain": 0.4}, {"pair": "b", "cosine": 0.9, "gain": 0.05}]
    return {"line": line, "points": points}


def an_outlook(cosine: float | None, agreement: float = 0.9) -> dict[str, Any]:
    point = {"teacher_log_prob": {"value": -2.0}, "reward": {"value": 0.25}, "accept_rate": {"value": 0.95}}
    return {
        "sequence_kl_budget": 1.0,
        "kl_budget": 0.05,
        "student": point | {"accept_rate": {"value": 1.0}},
        "blend": point,
        "teacher_reward": 0.75,
        "transfer": {
            "agreement": agreement,
            "policies": {
                "student": {"transfer": 0.42, "cosine": cosine},
                "blend": {"transfer": 0.97, "cosine": 0.99},
            },
        },
    }


def test_a_gain_above_the_error_is_advised_and_one_below_is_not():
    low, high = (advise(an_outlook(cosine), a_table()) for cosine in (0.3, 0.95))
    assert low.blend and low.gain == pytest.approx(35.0) and low.error == pytest.approx(5.0)
    assert not high.blend and high.gain == pytest.approx(2.5)
    assert "method: trb, which sets its budget itself" in low.sentences[-1] and "method: opd" in high.sentences[-1]
    text = " ".join(low.sentences)
    learned = ("0.42", "0.97", "0.30", "0.99", "+35.0 points", "off by 5.0")
    for number in (*learned, "1 nats", "95%", "about 20 tokens", "25.0%", "75.0%"):
        assert number in text


def test_what_the_map_has_not_seen_and_what_is_noise_are_said():
    plain, outside, noisy = an_outlook(0.5), an_outlook(0.1), an_outlook(0.5, agreement=0.1)
    said = [" ".join(advise(found, a_table()).sentences) for found in (plain, outside, noisy)]
    assert ["this is outside" in text for text in said] == [False, True, False]
    assert ["mostly noise" in text for text in said] == [False, False, True]


def test_nothing_is_foretold_from_noise():
    advice = advise(an_outlook(None, agreement=0.1), a_table())
    assert not advice.blend and math.isnan(advice.gain)
    text = " ".join(advice.sentences)
    assert "not to be told from noise" in text and "points of pass@1" not in text
    assert advice.sentences[-1] == "Advice: none can be given before more problems are probed."


def test_an_outlook_is_of_the_budget_asked_for(tiny_pair: TinyPair):
    found = outlook(id_subject(tiny_pair), sequence_kl_budget=0.3)
    assert found["kl_budget"] * found["student"]["length"]["value"] == pytest.approx(0.3)
    assert found["student"]["kl_budget"] == 0 and found["student"]["accept_rate"]["value"] == 1
    # A bound on every token bounds the mean over whole completions: at most the budget times their own length.
    assert 0 < found["blend"]["sequence_kl"]["value"] <= found["kl_budget"] * found["blend"]["length"]["value"] + 1e-9
    assert found["transfer"]["policies"].keys() == {"student", "blend"}
    assert advise(found, a_table()).sentences


def test_the_shipped_table_is_about_what_is_measured_and_what_trb_does_by_itself(tmp_path: Path):
    assert advise(an_outlook(0.5)).error > 0
    table = json.loads(TABLE.read_text())
    assert table["best"] == "cosine"  # the number that foretells best is the one that is measured
    record = json.loads((Path(__file__).parents[2] / table["source"]).read_text())
    assert record["advice"]["lines"][table["method"]]["cosine"] == table["line"]
    assert record["methods"][table["method"]] == {
        "method": "trb",
        "budget_schedule": budget_schedule_of(TRBConfig(str(tmp_path), report_to=[])),
    }
