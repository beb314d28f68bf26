"""Advice says what its table and the outlook say, and no more."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TinyPair
from id_subject import id_subject

from trb.policies import TeacherPolicy, TrustRegionPolicy
from trb.studies.advice import TABLE, advise, outlook
from trb.training.behaviors import budget_schedule_of
from trb.training.config import TRBConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import map_advice

ROOT = Path(__file__).parents[2]


def a_table(slope: float = -0.5, intercept: float = 0.5, error: float = 0.05) -> dict[str, Any]:
    line = {"slope": slope, "intercept": intercept, "error": error}
    points = [{"pair": "a", "cosine": 0.2, "gain": 0.4}, {"pair": "b", "cosine": 0.9, "gain": 0.05}]
    return {"line": line, "points": points}


def an_outlook(cosine: float | None, agreement: float = 0.9) -> dict[str, Any]:
    point = {
        "teacher_log_prob": {"value": -2.0},
        "reward": {"value": 0.25},
        "accept_rate": {"value": 0.95},
        "teacher_weight": {"value": 0.4},
        "sequence_kl": {"value": 0.83},
    }
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
    low, high = (advise(an_outlook(cosine), a_table()) for cosine in (0.3, 0.9))
    assert low.blend and low.gain == pytest.approx(35.0) and low.error == pytest.approx(5.0)
    assert not high.blend and high.gain == pytest.approx(5.0)
    assert "method: trb, which sets its budget itself" in low.sentences[-1] and "method: opd" in high.sentences[-1]
    text = " ".join(low.sentences)
    said = (
        "A line through the map's 2 pairs, of a setting built to study this, says +35.0 points of pass@1 for blending"
    )
    assert said in text and "went with" not in text
    for number in ("0.42", "0.97", "0.30", "0.99", "off by 5.0", "1 nats", "95%", "about 20 tokens", "25.0%", "75.0%"):
        assert number in text
    assert "At 1 nats a completion (0.05 a token) a blended one spends 0.83 on average." in low.sentences
    assert "trb doctor --plan --acceptance 0.95 predicts" in text and "hardly binds" not in text
    assert "outside" not in text and "is taken" not in text


def test_a_budget_above_all_there_is_is_said_to_bind_hardly():
    found = an_outlook(0.3) | {"sequence_kl_budget": 16.0, "kl_budget": 0.8}
    found["blend"] = found["blend"] | {"teacher_weight": {"value": 0.9999}, "sequence_kl": {"value": 2.04}}
    assert (
        "At 16 nats a completion (0.8 a token) a blended one spends 2.04 on average: the budget hardly binds, and "
        "blended rollouts are as good as the teacher's own."
    ) in advise(found, a_table()).sentences


@pytest.mark.parametrize("cosine", [-0.5, 0.1, 0.95, 1.3])
def test_the_line_is_not_read_beyond_the_pairs_that_it_goes_through(cosine: float):
    advice = advise(an_outlook(cosine), a_table())
    nearest = 0.2 if cosine < 0.2 else 0.9
    assert advice.gain == pytest.approx(100 * (0.5 - 0.5 * nearest))
    text = " ".join(advice.sentences)
    said = f"Those pairs had cosines from 0.20 to 0.90, and this is outside: the line is read at {nearest:.2f}."
    assert said in text and f"{advice.gain:+.1f} points" in text


@pytest.mark.parametrize(
    ("student", "teacher", "gain", "said"),
    [
        (0.25, 0.75, 50.0, "At most 50.0 points can be gained here (student 25.0%, teacher 75.0%): +50.0 is taken."),
        (0.9, 0.96, 6.0, "At most 6.0 points can be gained here (student 90.0%, teacher 96.0%): +6.0 is taken."),
        (0.9, 0.8, 0.0, "At most 0.0 points can be gained here (student 90.0%, teacher 80.0%): 0.0 is taken."),
        (0.75, None, 25.0, "At most 25.0 points can be gained here (student 75.0%): +25.0 is taken."),
        (0.75, math.nan, 25.0, "At most 25.0 points can be gained here (student 75.0%): +25.0 is taken."),
    ],
)
def test_no_more_is_foretold_than_can_be_gained(student: float, teacher: float | None, gain: float, said: str):
    found = an_outlook(0.3)
    found["student"] = found["student"] | {"reward": {"value": student}}
    found["teacher_reward"] = teacher
    advice = advise(found, a_table(slope=-1.0, intercept=1.2))  # 90 points
    assert advice.gain == pytest.approx(gain) and advice.blend == (gain > 5)
    assert said in " ".join(advice.sentences) and "+90.0 points" in " ".join(advice.sentences)


def test_no_loss_is_foretold_where_no_pair_lost():
    advice = advise(an_outlook(0.9), a_table(slope=-1.0))
    assert advice.gain == 0.0 and not advice.blend
    assert "On none of those pairs blending lost more than 0.0 points: 0.0 is taken." in advice.sentences
    lost = a_table(slope=-1.0)
    lost["points"][1]["gain"] = -0.004
    assert "lost more than 0.4 points: 0.0 is taken." in " ".join(advise(an_outlook(0.9), lost).sentences)


@pytest.mark.parametrize(("cosine", "agreement"), [(None, 0.1), (None, 0.9), (0.5, 0.1), (0.5, -0.5)])
def test_nothing_is_foretold_or_advised_from_noise(cosine: float | None, agreement: float):
    advice = advise(an_outlook(cosine, agreement), a_table())
    assert not advice.blend and math.isnan(advice.gain)
    text = " ".join(advice.sentences)
    assert "points of pass@1" not in text and "method:" not in text
    assert ("mostly noise" in text) == (agreement < 0.3) and ("not to be told from noise" in text) == (cosine is None)
    assert advice.sentences[-1] == "Advice: none can be given from so few problems; more with --problems N."


def test_the_shipped_map_foretells_nothing_impossible():
    found = an_outlook(0.2) | {"teacher_reward": 1.0}
    found["student"] = found["student"] | {"reward": {"value": 0.0}}
    low, high = advise(found), advise(found | {"transfer": an_outlook(0.99)["transfer"]})
    assert 80 < low.gain <= 100 and low.blend
    assert "from 0.35 to 0.99, and this is outside: the line is read at 0.35." in " ".join(low.sentences)
    assert high.gain == 0.0 and not high.blend


def test_an_outlook_is_of_the_budget_asked_for(tiny_pair: TinyPair):
    found = outlook(id_subject(tiny_pair), sequence_kl_budget=0.3)
    assert found["kl_budget"] * found["student"]["length"]["value"] == pytest.approx(0.3)
    assert found["student"]["kl_budget"] == 0 and found["student"]["accept_rate"]["value"] == 1
    # A bound on every token bounds the mean over whole completions: at most the budget times their own length.
    assert 0 < found["blend"]["sequence_kl"]["value"] <= found["kl_budget"] * found["blend"]["length"]["value"] + 1e-9
    assert found["transfer"]["policies"].keys() == {"student", "blend"}
    assert "hardly binds" not in " ".join(advise(found, a_table()).sentences)


def test_a_budget_that_no_token_reaches_leaves_the_teacher(tiny_pair: TinyPair):
    subject = id_subject(tiny_pair)
    found = outlook(subject, sequence_kl_budget=1000.0)
    assert found["blend"]["sequence_kl"]["value"] < 100
    assert subject.rollouts(TrustRegionPolicy(found["kl_budget"])).completions == (
        subject.rollouts(TeacherPolicy()).completions
    )
    assert "hardly binds, and blended rollouts are as good as the teacher's own" in " ".join(
        advise(found, a_table()).sentences
    )


def test_the_shipped_table_is_about_what_is_measured_and_what_trb_does_by_itself(tmp_path: Path):
    assert advise(an_outlook(0.5)).error > 0
    table = json.loads(TABLE.read_text())
    assert table["best"] == "cosine"  # the number that foretells best is the one that is measured
    record = json.loads((ROOT / table["source"]).read_text())
    assert record["advice"]["lines"][table["method"]]["cosine"] == table["line"]
    assert record["methods"][table["method"]] == {
        "method": "trb",
        "budget_schedule": budget_schedule_of(TRBConfig(str(tmp_path), report_to=[])),
    }


def off_at_points_left_out(x: np.ndarray, y: np.ndarray) -> float:
    """Mean absolute error of a point read off the line through the others."""
    kept = ~np.eye(len(x), dtype=bool)
    lines = [np.polyfit(x[others], y[others], 1) for others in kept]
    return float(np.mean([abs(np.polyval(line, x[out]) - y[out]) for out, line in enumerate(lines)]))


def test_the_shipped_error_is_that_of_points_left_out():
    table = json.loads(TABLE.read_text())
    shown = [np.array([point[key] for point in table["points"]]) for key in ("cosine", "gain")]
    # The table's points have four digits: an error is off by 5e-5 of the gain, and by the slope's 1.6 times as much.
    assert off_at_points_left_out(*shown) == pytest.approx(table["line"]["error"], abs=3e-4)
    assert np.polyfit(*shown, 1) == pytest.approx([table["line"]["slope"], table["line"]["intercept"]], rel=1e-3)


def test_the_cosine_is_chosen_without_the_point_it_is_judged_by():
    """The best of the eleven numbers is the cosine whichever point is left out, so that the error shipped is also that
    of choosing and fitting without the point."""
    table = json.loads(TABLE.read_text())
    points = map_advice.points_of(json.loads((ROOT / table["source"]).read_text()))
    gains = np.array([np.mean(point["gains"]) for point in points])
    numbers = {
        name: np.array([number(point["step0"]) for point in points]) for name, number in map_advice.CANDIDATES.items()
    }
    assert (len(numbers), len(points)) == (11, 14)
    lines = map_advice.judge(points)
    assert lines["cosine"].error == pytest.approx(table["line"]["error"], rel=1e-9)
    for name, line in lines.items():
        assert line.error == pytest.approx(off_at_points_left_out(numbers[name], gains), rel=1e-9), name
    for others in ~np.eye(len(points), dtype=bool):
        errors = {name: off_at_points_left_out(x[others], gains[others]) for name, x in numbers.items()}
        assert min(errors, key=lambda name: errors[name]) == "cosine"
