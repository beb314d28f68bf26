"""The copy that is sampled from, what it refuses, and the launches that recipes/accelerate set up; in one process.

Two processes are in `test_distributed`.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed_worker
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from trb import TRBConfig, zoo
from trb.studies.shipped import RECIPES
from trb.training.ranks import Ranks
from trb.training.sharding import (
    ExpireOnUpdate,
    Replica,
    check_sharding,
    leave_outputs_alone,
    loaded_whole,
    shards_parameters,
)

CPU = torch.device("cpu")
LAUNCHES = RECIPES / "accelerate"


def accelerator(*, fsdp: Any = None, zero_stage: int | None = None, count: int = 2) -> Any:
    deepspeed = None if zero_stage is None else SimpleNamespace(zero_stage=zero_stage)
    return SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=fsdp, deepspeed_plugin=deepspeed), num_processes=count, device=CPU
    )


def fsdp(version: int = 2, *, from_first_only: bool = False, policy: Any = None) -> Any:
    return SimpleNamespace(
        fsdp_version=version, cpu_ram_efficient_loading=from_first_only, mixed_precision_policy=policy
    )


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12).reshape(2, 6)).logits


# ---- the copy ----


def test_a_replica_says_what_its_original_says_after_every_update() -> None:
    student, _ = zoo.load("student")
    replica = Replica(student, device=CPU)
    replica.refresh(student)
    assert torch.equal(logits(replica.module), logits(student))
    before = logits(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.01)
    assert torch.equal(logits(replica.module), before)
    ExpireOnUpdate(replica).on_optimizer_step()
    replica.refresh(student)
    assert torch.equal(logits(replica.module), logits(student))
    assert not torch.equal(logits(student), before)


def test_a_replica_shares_no_weight_with_its_original_and_keeps_its_ties() -> None:
    student, _ = zoo.load("student")
    replica = Replica(student, device=CPU, dtype=torch.bfloat16)
    replica.refresh(student)
    theirs = {parameter.data_ptr() for parameter in student.parameters()}
    for parameter in replica.module.parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.data_ptr() not in theirs
        assert not parameter.requires_grad
    tied = student.get_input_embeddings().weight is student.get_output_embeddings().weight
    assert tied
    assert replica.module.get_input_embeddings().weight is replica.module.get_output_embeddings().weight
    assert next(replica.module.buffers()).dtype == next(student.buffers()).dtype  # rotary frequencies stay float32
    assert not replica.module.training
    assert replica.module.config is not student.config  # the sampler changes its attention


def test_a_replica_reads_frozen_weights_once_and_adapters_after_every_update() -> None:
    student = get_peft_model(zoo.load("student")[0], LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    replica = Replica(student, device=CPU)
    replica.refresh(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    replica.expire()
    replica.refresh(student)
    pairs = list(zip(student.named_parameters(), replica.module.parameters(), strict=True))
    assert any("lora_" in name for (name, _), _ in pairs)
    for (name, theirs), ours in pairs:
        torch.testing.assert_close(ours, theirs.detach() if "lora_" in name else theirs.detach() - 1.0)


def test_a_quantised_model_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"weight is quantised \(torch.uint8\)"):
        Replica(model, device=CPU)


# ---- launches ----


@pytest.mark.parametrize(
    ("launch", "sharded"),
    [
        (accelerator(), False),
        (accelerator(zero_stage=2), False),
        (accelerator(zero_stage=3), True),
        (accelerator(fsdp=fsdp()), True),
    ],
)
def test_which_launches_shard_the_weights(launch: Any, sharded: bool) -> None:
    assert shards_parameters(launch) is sharded


@pytest.mark.parametrize(
    ("launch", "remedy"),
    [
        (accelerator(fsdp=fsdp(1)), "fsdp_version: 2"),
        (accelerator(fsdp=fsdp(from_first_only=True)), "fsdp_cpu_ram_efficient_loading: false"),
    ],
)
def test_a_launch_that_cannot_be_sampled_in_is_refused(launch: Any, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        check_sharding(launch, nn.Linear(2, 2))


def test_a_model_that_was_sharded_while_it_was_loaded_is_refused() -> None:
    model = nn.Linear(2, 2)
    check_sharding(accelerator(zero_stage=3), model)
    model.bias.ds_id = 1  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"bias is not whole.*loaded_whole"):
        check_sharding(accelerator(zero_stage=3), model)


def test_losses_are_not_rounded_to_the_compute_dtype() -> None:
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    launch = accelerator(fsdp=fsdp(policy=policy))
    leave_outputs_alone(launch)
    assert launch.state.fsdp_plugin.mixed_precision_policy == MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, None)
    leave_outputs_alone(accelerator())
    leave_outputs_alone(accelerator(fsdp=fsdp()))


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_the_recipes_for_accelerate_set_up_what_is_tested(name: str) -> None:
    given = ["--config_file", str(LAUNCHES / f"{name}.yaml"), "--main_process_port", "0", "-m", "trb"]  # any free port
    parsed = launch_command_parser().parse_args(given)
    arguments, *_ = _validate_launch_command(parsed)
    arguments.deepspeed_fields_from_accelerate_config = ""
    variables = prepare_deepspeed_cmd_env(arguments)[1] if name == "zero3" else prepare_multi_gpu_env(arguments)
    tested = {"ddp": {}, "fsdp2": distributed_worker.FSDP2, "zero3": distributed_worker.ZERO3}[name]
    assert {key: variables.get(key) for key in tested} == tested
    assert ("ACCELERATE_USE_FSDP" in variables) is (name == "fsdp2")


# ---- options ----


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="replica_dtype='fp8' is unknown; choose one of auto, float32"):
        TRBConfig(str(tmp_path), replica_dtype="fp8")


def test_a_sharded_teacher_needs_a_sharded_launch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teacher_sharded=True needs a launch with FSDP2 or ZeRO-3"):
        distributed_worker.build(tmp_path, 1, teacher_sharded=True)


def test_outside_zero3_models_are_loaded_whole_anyway(tmp_path: Path) -> None:
    with loaded_whole(TRBConfig(str(tmp_path))):
        student, _ = zoo.load("student")
    check_sharding(accelerator(zero_stage=3), student)


def test_alone_a_process_exchanges_with_itself() -> None:
    ranks = Ranks.of_launch()
    assert ranks == Ranks(0, 1)
    assert ranks.gather("x") == ["x"]
    assert ranks.from_first(lambda: 3) == 3
    with pytest.raises(KeyError):
        ranks.from_first(lambda: {}["missing"])
