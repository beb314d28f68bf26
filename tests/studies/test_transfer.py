"""The transfer of rollouts, against gradients of a loss written out in plain torch, and against what it foretells."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from conftest import TinyPair
from id_subject import PROMPTS, id_subject
from torch import Tensor

from trb.policies import StudentPolicy, TeacherPolicy, TrustRegionPolicy
from trb.studies.subject import Subject
from trb.studies.transfer import gradient_transfer

TAUGHT = [[*ids, 5, 3] for ids in reversed(PROMPTS)]
POLICIES = {"student": StudentPolicy(), "blend": TrustRegionPolicy(0.2), "teacher": TeacherPolicy()}


@pytest.fixture
def subject(tiny_pair: TinyPair) -> Subject:
    return id_subject(tiny_pair)


def shared(logits: Tensor, pair: TinyPair) -> Tensor:
    """Log-probabilities over the rows both heads have, either stop id being one event."""
    log_probs = logits[..., : pair.rows].log_softmax(-1)
    stop = torch.logsumexp(log_probs[..., [pair.student_eos, pair.teacher_eos]], -1, keepdim=True)
    others = [token for token in range(pair.rows) if token not in (pair.student_eos, pair.teacher_eos)]
    return torch.cat([log_probs[..., others], stop], -1).log_softmax(-1)


def plain_loss(subject: Subject, pair: TinyPair, rows: Sequence[int], completions: Sequence[list[int]]) -> Tensor:
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row, completion in zip(rows, completions, strict=True):
        problem = subject.problem_of_row[row]
        taught = PROMPTS if subject.teacher_problems is None else TAUGHT
        student, teacher = (
            shared(model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1], pair)
            for model, prompt in ((subject.student, PROMPTS[problem]), (subject.teacher, taught[problem]))
        )
        total = total + (student.exp() * (student - teacher)).sum()
        tokens += len(completion)
    return total / tokens


def halves(subject: Subject, policy) -> list[tuple[list[int], list[list[int]]]]:
    completions = subject.rollouts(policy).completions
    parts = [[r for r, problem in enumerate(subject.problem_of_row) if problem % 2 == half] for half in (0, 1)]
    return [(rows, [completions[row] for row in rows]) for rows in parts]


def gradients(subject: Subject, pair: TinyPair, policy) -> list[Tensor]:
    found = []
    for rows, completions in halves(subject, policy):
        parts = torch.autograd.grad(plain_loss(subject, pair, rows, completions), list(subject.student.parameters()))
        found.append(torch.cat([part.flatten() for part in parts]))
    return found


@pytest.mark.parametrize("privileged", [False, True], ids=["one prompt", "the teacher has its own"])
def test_transfer_is_the_product_of_plain_gradients_of_different_problems(tiny_pair, subject, privileged):
    if privileged:
        rows = [{"prompt": [{"role": "user", "content": " ".join(map(str, ids))}], "answer": "0"} for ids in TAUGHT]
        subject = replace(subject, teacher_problems=rows)
    found = gradient_transfer(subject, policies=POLICIES)
    good = gradients(subject, tiny_pair, TeacherPolicy())
    length = good[0] @ good[1]
    for name, policy in POLICIES.items():
        own = gradients(subject, tiny_pair, policy)
        product = (own[0] @ good[1] + own[1] @ good[0]) / 2
        numbers = found["policies"][name]
        assert numbers["transfer"] == pytest.approx((product / length).item(), rel=1e-9)
        assert numbers["cosine"] == pytest.approx((product / (own[0] @ own[1] * length).sqrt()).item(), rel=1e-9)
        losses = [plain_loss(subject, tiny_pair, *half).item() for half in halves(subject, policy)]
        assert numbers["loss"] == pytest.approx(math.fsum(losses) / 2, rel=1e-9)
    assert found["policies"]["teacher"]["transfer"] == pytest.approx(1, rel=1e-12)
    assert found["agreement"] == pytest.approx((length / (good[0].norm() * good[1].norm())).item(), rel=1e-9)
    assert found["policies"]["student"]["transfer"] != pytest.approx(1, rel=0.01)


def test_copies_of_a_problem_are_never_taken_for_another_problem(tiny_pair, subject):
    """Its two halves have no problem in common, wherever copies stand: the numbers are those of one each."""
    rows = list(subject.problems)
    copied = replace(subject, problems=[row for row in rows for _ in range(3)])
    one, other = (gradient_transfer(each, policies=POLICIES) for each in (subject, copied))
    assert other["agreement"] == pytest.approx(one["agreement"], rel=1e-9)
    for name, numbers in one["policies"].items():
        assert other["policies"][name] == pytest.approx(numbers, rel=1e-9)


def test_one_skill_for_every_prefix_transfers_whole(tiny_pair, subject):
    """To models that see one token in all others every prefix is the same, and so is what their heads learn from it."""
    subject = replace(subject, teacher=copy.deepcopy(subject.teacher))
    with torch.no_grad():
        for model in (subject.student, subject.teacher):
            embeddings = model.get_input_embeddings().weight
            embeddings.copy_(embeddings[1].expand_as(embeddings))
    subject.student.requires_grad_(False).get_output_embeddings().weight.requires_grad_(True)
    found = gradient_transfer(subject, policies=POLICIES)
    assert len({*subject.rollouts(StudentPolicy()).lengths}) > 1
    assert found["policies"]["student"]["loss"] > 0.1
    for numbers in (found["policies"]["student"], found["policies"]["blend"]):
        assert numbers["transfer"] == pytest.approx(1, rel=1e-9)
        assert numbers["cosine"] == pytest.approx(1, rel=1e-9)


def test_transfer_foretells_a_small_step(tiny_pair, subject):
    """A step on the student's rollouts lowers the loss on the teacher's by `transfer` of what a step on those does."""
    found = gradient_transfer(subject, policies={"student": StudentPolicy()})
    good = halves(subject, TeacherPolicy())
    rate, lowered = 1e-6, {}
    for policy in (StudentPolicy(), TeacherPolicy()):
        gains = []
        for half, gradient in enumerate(gradients(subject, tiny_pair, policy)):
            stepped = copy.deepcopy(subject.student)
            torch.nn.utils.vector_to_parameters(
                torch.nn.utils.parameters_to_vector(stepped.parameters()) - rate * gradient, stepped.parameters()
            )
            moved = replace(subject, student=stepped)
            with torch.no_grad():
                gains.append(
                    plain_loss(subject, tiny_pair, *good[1 - half]) - plain_loss(moved, tiny_pair, *good[1 - half])
                )
        lowered[policy] = sum(gains)
    ratio = (lowered[StudentPolicy()] / lowered[TeacherPolicy()]).item()
    assert found["policies"]["student"]["transfer"] == pytest.approx(ratio, rel=1e-3)


def test_measuring_leaves_the_student_as_it_was(subject):
    for parameter in subject.student.parameters():
        parameter.grad = torch.ones_like(parameter)
    subject.student.train()
    before = {name: value.clone() for name, value in subject.student.state_dict().items()}
    gradient_transfer(subject, policies={"student": StudentPolicy()})
    assert subject.student.training
    assert all(torch.equal(value, before[name]) for name, value in subject.student.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in subject.student.parameters())


def test_parameters_that_are_not_trained_do_not_count(tiny_pair, subject):
    for name, parameter in subject.student.named_parameters():
        parameter.requires_grad_("mlp" in name)
    found = gradient_transfer(subject, policies={"student": StudentPolicy()})
    whole = copy.deepcopy(subject.student).requires_grad_(True)
    other = replace(subject, student=whole, remember=lambda name, compute: compute())
    everything = gradient_transfer(other, policies={"student": StudentPolicy()})
    assert found["policies"]["student"]["transfer"] != everything["policies"]["student"]["transfer"]
