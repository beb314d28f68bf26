"""Weights that come to a device and leave it: what is there meanwhile, and that nothing of it stays."""

import copy

import pytest
import torch
from torch import nn

from trb import zoo
from trb.errors import InputError
from trb.models.residence import check_movable, present
from trb.models.sharing import own_weights, shared_teacher

ELSEWHERE = torch.device("meta")  # a second device that every machine has
HERE = torch.device("cpu")


def tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("name", ["student", "teacher"])  # the student's head is tied
def test_all_of_a_model_is_elsewhere_within_the_block_and_the_very_same_afterwards(name: str) -> None:
    model, _ = zoo.load(name)
    before, values = tensors(model), [tensor.clone() for tensor in tensors(model)]
    with present(model, ELSEWHERE):
        assert {tensor.device for tensor in tensors(model)} == {ELSEWHERE}
        assert len(tensors(model)) == len(before)  # tied weights count once
        assert model.device == ELSEWHERE and not any(weight.requires_grad for weight in model.parameters())
        with present(model, ELSEWHERE):  # is there already
            pass
        assert {tensor.device for tensor in tensors(model)} == {ELSEWHERE}
    assert all(one is other for one, other in zip(tensors(model), before, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(tensors(model), values, strict=True))


def test_an_error_within_the_block_leaves_nothing_behind() -> None:
    model, _ = zoo.load("student")
    with pytest.raises(KeyError), present(model, ELSEWHERE):
        raise KeyError
    assert {tensor.device for tensor in tensors(model)} == {HERE}


def test_a_part_comes_alone_and_on_one_device_nothing_happens() -> None:
    model, _ = zoo.load("teacher")
    with present(model.lm_head, ELSEWHERE):
        assert [name for name, weight in model.named_parameters() if weight.device == ELSEWHERE] == ["lm_head.weight"]
    before = tensors(model)
    with present(model, HERE):
        assert all(one is other for one, other in zip(tensors(model), before, strict=True))


def test_what_a_teacher_shares_with_the_student_stays() -> None:
    student, _ = zoo.load("student")
    teacher = shared_teacher(student)
    assert not [*own_weights(teacher, student)]
    with present(teacher, HERE):
        assert teacher.get_input_embeddings().weight is student.get_input_embeddings().weight


def test_weights_that_cannot_move_are_refused() -> None:
    model, _ = zoo.load("student")
    check_movable(model)
    packed = copy.deepcopy(model)
    packed.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"up_proj.weight is quantised or sharded.*teacher_offload=False"):
        check_movable(packed)


def test_a_causal_mask_among_the_buffers_is_no_packed_weight() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool).tril())
    check_movable(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_is_taken_within_the_block_only() -> None:
    model = nn.Linear(1 << 12, 1 << 12)
    before = torch.cuda.memory_allocated()
    rows = torch.ones(2, 1 << 12)
    wanted = model(rows).detach()
    with torch.no_grad(), present(model, torch.device("cuda", torch.cuda.current_device())):
        assert torch.cuda.memory_allocated() - before >= 4 << 24
        assert torch.allclose(model(rows.cuda()).cpu(), wanted, atol=1e-3)
    assert torch.cuda.memory_allocated() == before
