"""One table says what a method is: its entries train, combine, resume, and are everything that knows a method."""

import ast
import contextlib
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import Kill, build, config, logged, losses, weights
from toy_method import ENTRIES, Fading, MixturePolicy

import trb
from trb.losses import EntropyAware, PrefixWeighted, ReliableRegion, ReverseKL, Supervised, TokenImportance, Veto
from trb.policies import StudentPolicy, TeacherPolicy, TrustRegionPolicy
from trb.report.style import label, style_indices
from trb.sampling import SAMPLERS, Sampler
from trb.sampling.vllm.verification import BlendRequest
from trb.schedule import KINDS, Constant, FirstSteps
from trb.training import behaviors
from trb.training.methods import (
    BEHAVIORS,
    BUDGET_SCHEDULES,
    METHODS,
    TARGETS,
    Method,
    behavior_of,
    every_knob,
    knobs_of,
    name_of,
    owners_of,
    target_of,
)
from trb.training.metrics import Observers, Sums
from trb.training.ranks import Ranks
from trb.vocab import SharedVocabulary


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    for table, name, entry in ENTRIES:
        monkeypatch.setitem(table, name, entry)


def test_what_is_added_from_outside_trains_resumes_and_is_seen(tmp_path: Path, toy: None) -> None:
    settings: dict[str, Any] = {"method": "imitation", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = build(tmp_path / "straight", **settings)
    straight.train()
    shares = logged(straight, "teacher_weight")
    assert shares[0] == pytest.approx(0.8)
    assert shares == sorted(shares, reverse=True)
    assert len(set(shares)) == 4

    killed = build(tmp_path / "killed", callbacks=[Kill(3)], **settings)
    with contextlib.suppress(KeyboardInterrupt):
        killed.train()
    resumed = build(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed, "teacher_weight") == shares
    assert losses(resumed) == losses(straight)
    both = zip(weights(straight).values(), weights(resumed).values(), strict=True)
    assert all(torch.equal(one, other) for one, other in both)

    assert label("imitation") == "Imitation"
    assert style_indices(["imitation", "trb"])["trb"] == 0
    request = BlendRequest("r", MixturePolicy(0.5), SharedVocabulary.of([9], 2), 1.0, 4, 0, 0, 0)
    assert json.loads(request.to_text())["policy"] == {"name": "MixturePolicy", "share": 0.5}
    assert BlendRequest.from_text(request.to_text()) == request


def test_a_sampler_added_from_outside_is_called_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*models: Any, **options: Any) -> Any:
        calls.append(len(models[2]))
        return SAMPLERS["speculative"].run(*models, **options)

    monkeypatch.setitem(SAMPLERS, "counted", Sampler(counted, in_slots=True))
    trainer = build(tmp_path, sampler="counted")
    trainer.train()
    assert calls == [8, 8]


def test_a_checkpoint_without_a_schedules_state_is_refused(tmp_path: Path, toy: None) -> None:
    observers = Observers({"behavior": Fading(), "loss": Constant(0.0)})
    observers.load_state_dict(observers.state_dict())
    with pytest.raises(ValueError, match="no state of the behavior's Fading"):
        observers.load_state_dict({})


def test_schedules_that_remember_are_shown_each_step_once() -> None:
    schedule = Fading()
    observers = Observers({"behavior": schedule, "loss": schedule})
    for total, count in ((3.0, 1), (1.0, 3)):
        observers.add("reverse_kl", total, count)
    observers.end_step(0, Ranks())
    assert schedule.now == pytest.approx(0.8 * 0.5)  # a mean of 1
    observers.end_step(1, Ranks())  # nothing is left of the step before
    assert schedule.now == pytest.approx(0.8 * 0.5)


def test_sums_survive_a_checkpoint_to_the_bit() -> None:
    sums, again = Sums(), Sums()
    sums.add("a", 0.1, 3)
    sums.add("a", 0.2, 4)
    sums.add("b", float("nan"), 1)  # of a step that is skipped
    again.load_state_dict(json.loads(json.dumps(sums.state_dict())))
    found = sums.take(Ranks())
    assert found == {"a": pytest.approx(0.3 / 7)}
    assert again.take(Ranks()) == found
    assert sums.take(Ranks()) == {}


@pytest.mark.parametrize("behavior", BEHAVIORS)
@pytest.mark.parametrize("loss", TARGETS)
def test_every_behavior_meets_every_loss(tmp_path: Path, behavior: str, loss: str) -> None:
    args = config(tmp_path, behavior=behavior, loss=loss)
    assert behavior_of(args).at(0) == behavior_of(config(tmp_path, behavior=behavior)).at(0)
    assert target_of(args, lambda: 9).at(0) == target_of(config(tmp_path, loss=loss), lambda: 9).at(0)
    expected = next((m for m, row in METHODS.items() if (row.behavior, row.loss) == (behavior, loss)), None)
    assert name_of(args) == ("trb" if expected == "trb" else f"{behavior}+{loss}")


def test_blended_rollouts_meet_vetos_target(tmp_path: Path) -> None:
    trainer = build(tmp_path / "both", method="trb", loss="veto", veto_strength=0.8)
    trainer.train()
    plain = build(tmp_path / "trb", method="trb")
    plain.train()
    assert logged(trainer, "kl_budget") == logged(plain, "kl_budget")
    assert logged(trainer, "kl_student")[0] == logged(plain, "kl_student")[0] > 0
    assert losses(trainer)[0] != pytest.approx(losses(plain)[0], rel=1e-2)


@pytest.mark.parametrize(
    ("method", "at_start", "later"),
    [
        ("trb", ReverseKL(16), ReverseKL(16)),
        ("veto", Veto(16, 0.4), Veto(16, 0.0)),
        ("sft", Supervised(16), ReverseKL(16)),
        ("eopd", EntropyAware(16, 0.8, 16), EntropyAware(16, 0.8, 16)),
        ("tip", TokenImportance(16, 0.5), TokenImportance(16, 0.5)),
        ("tropd", ReliableRegion(16, 16), ReliableRegion(16, 16)),
        ("iw", PrefixWeighted(16, 0.5), PrefixWeighted(16, 0.5)),
    ],
)
def test_the_loss_of_a_step(tmp_path: Path, method: str, at_start: object, later: object) -> None:
    target = target_of(config(tmp_path, method=method), lambda: 50)
    assert target.at(0) == at_start
    assert target.at(50) == later


def test_the_first_steps_end_on_time(tmp_path: Path) -> None:
    behavior = behavior_of(config(tmp_path, method="sft", sft_warmup_steps=2))
    assert [behavior.at(step) for step in range(3)] == [TeacherPolicy(), TeacherPolicy(), StudentPolicy()]
    assert [FirstSteps(2).value(step) for step in range(3)] == [1.0, 1.0, 0.0]
    assert behavior_of(config(tmp_path, initial_kl_budget=0.5, blend_warmup_steps=4)).at(1) == TrustRegionPolicy(0.375)


def test_every_knob_has_an_owner_and_is_an_option() -> None:
    names = set(trb.TRBConfig.__dataclass_fields__)
    assert every_knob() <= names
    assert all(owners_of(knob) for knob in every_knob())
    plain = SimpleNamespace(method="opd", behavior=None, loss=None)
    assert knobs_of([plain]) == {"loss_top_k"}
    found = [
        knobs_of([SimpleNamespace(method="trb", behavior=None, loss=None, budget_schedule=kind)]) for kind in KINDS
    ]
    assert found[0] == found[1] == found[2] | {"blend_warmup_steps"}
    assert {"initial_kl_budget", "budget_schedule", "behavior_share", "loss_top_k"} == found[2]
    assert owners_of("sequence_kl_budget") == [
        "method: geometric",
        *(
            "behavior: geometric",
            "budget_schedule: sequence",
            "budget_schedule: sequence-linear",
            "budget_schedule: gap",
        ),
    ]
    assert owners_of("veto_strength") == ["method: veto", "loss: veto"]
    assert owners_of("seed") == []


def test_a_loss_that_is_called_like_a_behavior_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "skd", dataclasses.replace(TARGETS["reverse_kl"], knobs=()))
    monkeypatch.setitem(METHODS, "namesake", Method("student", "skd", "Namesake", "a loss with a behavior's name"))
    assert owners_of("skd_teacher_top_k") == ["method: skd", "behavior: skd"]


def test_help_says_which_part_of_the_training_the_default_budget_lasts() -> None:
    assert "after a fifth of the training" in BUDGET_SCHEDULES["sequence-linear"].text
    assert behaviors._FALLING_PARTS == 5


def test_an_option_is_read_by_its_owner_alone(tmp_path: Path) -> None:
    """What a half builds depends on its knobs, and on no other option."""
    for schedule in BUDGET_SCHEDULES:
        args = config(tmp_path, budget_schedule=schedule)
        for half in (*BEHAVIORS.values(), *TARGETS.values()):
            read = {*half.reads(args), "max_completion_length"}
            half.build(SimpleNamespace(**{knob: getattr(args, knob) for knob in read}), lambda: 9).at(0)


def test_no_other_module_asks_which_method_it_is() -> None:
    """Comparisons of a method's, behavior's or loss's name, and their names as text, are in the table alone."""
    package, found = Path(trb.__file__).parent, []
    for path in sorted(package.rglob("*.py")):
        if path.name == "methods.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
                if any(side.endswith(("args.method", "args.behavior", "args.loss")) for side in sides):
                    found.append(f"{path.relative_to(package)}:{node.lineno}: {ast.unparse(node)}")
    assert found == []
