"""A second tree of modules over the weights of a model: what it says, what is copied, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import TEACHER_ROWS, tiny_llama
from peft import IA3Config, LoraConfig, MissConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor
from transformers import PreTrainedModel

from trb.models.modeling import has_adapters, without_adapters
from trb.models.sharing import adapter_directory, own_weights, shared_teacher, shares_weights

TARGETS: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
IDS = torch.tensor([[1, 2, 3, 4]])
KEPT = {
    "lora": LoraConfig(r=2, **TARGETS),
    "dora": LoraConfig(r=2, use_dora=True, **TARGETS),
    "head": LoraConfig(r=2, **{**TARGETS, "target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "saved": LoraConfig(r=2, modules_to_save=["lm_head", "embed_tokens"], **TARGETS),
    "tokens": LoraConfig(r=2, trainable_token_indices=[1, 3], **TARGETS),
    "ia3": IA3Config(feedforward_modules=[], **TARGETS),
    "miss": MissConfig(r=2, **TARGETS),
}


def adapted(config: PeftConfig, *, seed: int = 7, base: PreTrainedModel | None = None) -> PeftModel:
    """A model whose adapter, in all its parts, changes what it says."""
    own = tiny_llama(TEACHER_ROWS, seed=5) if base is None else base
    torch.manual_seed(seed)
    model = get_peft_model(own, config, autocast_adapter_dtype=False).to(own.dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.5 * torch.randn(weight.shape, generator=generator).to(weight.dtype))
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def saved(directory: Path, **options: Any) -> Path:
    """The directory of an adapter on the base of `adapted`."""
    base = tiny_llama(TEACHER_ROWS, seed=5)
    model = adapted(LoraConfig(r=2, **{**TARGETS, **options}), seed=9, base=base.float() if options else base)
    model.save_pretrained(directory, save_embedding_layers=False)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "tiny"}))
    return directory


@pytest.mark.parametrize("kind", KEPT)
def test_the_base_says_what_it_said_before_it_had_an_adapter_and_nothing_is_copied(kind: str) -> None:
    base = tiny_llama(TEACHER_ROWS, seed=5)
    if kind == "saved":  # PEFT warns of adapters on tied layers
        base.config.tie_word_embeddings = False
    student = adapted(KEPT[kind], base=base)
    before = logits(student)
    teacher = shared_teacher(student)
    assert torch.equal(logits(teacher), logits(tiny_llama(TEACHER_ROWS, seed=5)))
    assert not torch.allclose(logits(teacher), before, atol=1e-2)
    assert torch.equal(logits(student), before) and has_adapters(student) and not has_adapters(teacher)
    assert not list(own_weights(teacher, student)) and shares_weights(teacher, student)
    buffers = {buffer.data_ptr() for buffer in student.buffers()}
    assert all(buffer.data_ptr() in buffers for buffer in teacher.buffers())


def test_mode_hooks_and_attention_are_each_trees_own() -> None:
    student = adapted(KEPT["lora"])
    seen: list[str] = []
    teacher = shared_teacher(student)
    student.train()
    teacher.set_attn_implementation("eager")
    without_adapters(student).model.layers[0].register_forward_hook(lambda *_: seen.append("student"))
    logits(teacher)
    assert not seen and not any(module.training for module in teacher.modules())
    assert all(module.training for module in student.modules())
    assert without_adapters(student).config._attn_implementation == "sdpa"


def test_a_pass_of_the_teacher_between_a_loss_and_its_checkpointed_gradient_changes_nothing() -> None:
    """The layers are computed again for the gradient, with the adapter they were computed with."""

    def gradients(*, checkpointing: bool) -> list[Tensor]:
        student = adapted(KEPT["lora"])
        teacher = shared_teacher(student)
        if checkpointing:
            student.enable_input_require_grads()
            inner: Any = without_adapters(student)
            newer = getattr(inner, "activation_checkpointing_enable", None)
            (newer or inner.gradient_checkpointing_enable)({"use_reentrant": False})
        student.train()
        output = student(input_ids=IDS, use_cache=False).logits.pow(2).mean()
        assert torch.equal(logits(teacher), logits(tiny_llama(TEACHER_ROWS, seed=5)))
        output.backward()
        assert all(weight.grad is None for weight in teacher.parameters())
        return [weight.grad for weight in student.parameters() if weight.grad is not None]

    plain, checkpointed = gradients(checkpointing=False), gradients(checkpointing=True)
    assert len(plain) == 4
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(plain, checkpointed, strict=True))


def test_a_student_whose_passes_accelerate_has_wrapped_is_not_what_its_teacher_runs() -> None:
    """It puts a function of its own in the model, which a copy would take over as it is, student inside."""
    student = inject_adapter_in_model(LoraConfig(r=2, **TARGETS), tiny_llama(TEACHER_ROWS, seed=5).float())
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    wrapped = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(student)
    assert torch.equal(logits(shared_teacher(wrapped)), logits(tiny_llama(TEACHER_ROWS, seed=5).float()))
    assert not torch.allclose(logits(wrapped), logits(shared_teacher(wrapped)), atol=0.1)


def test_a_student_that_was_moved_takes_its_teacher_along() -> None:
    student = adapted(KEPT["lora"])
    teacher = shared_teacher(student)
    student.to(torch.float32)
    assert teacher.dtype == torch.float32 and not list(own_weights(teacher, student))


def test_another_adapter_stands_on_the_same_weights(tmp_path: Path) -> None:
    student = adapted(KEPT["lora"])
    before = logits(student)
    teacher = shared_teacher(student, f"adapter:{saved(tmp_path)}")
    assert torch.allclose(logits(teacher), logits(adapted(LoraConfig(r=2, **TARGETS), seed=9)), atol=1e-12)
    assert torch.equal(logits(student), before)
    own = dict(own_weights(teacher, student))
    assert own and all("lora_" in name and not weight.requires_grad for name, weight in own.items())
    assert [name for name, weight in student.named_parameters() if weight.requires_grad] == [
        name for name, _ in student.named_parameters() if "lora_" in name
    ]


def test_a_student_that_is_yet_to_get_its_adapter_stays_as_it_is(tmp_path: Path) -> None:
    """Its gradient may be asked for, and PEFT freezes what it puts an adapter on."""
    student = tiny_llama(TEACHER_ROWS, seed=5).requires_grad_(True)
    student.model.norm.requires_grad_(False)
    own = logits(student)
    for spec in ("base", f"adapter:{saved(tmp_path)}"):
        assert shares_weights(shared_teacher(student, spec), student)
    frozen = [name for name, weight in student.named_parameters() if not weight.requires_grad]
    assert frozen == ["model.norm.weight"] and torch.equal(logits(student), own)


# ---- refused ----


@pytest.mark.parametrize(("options", "why"), [
    ({"init_lora_weights": "olora"}, "init_lora_weights='olora' takes a part of the base's weights away"),
    ({"bias": "all"}, "bias='all' trains biases of the base"),
])  # fmt: skip
def test_adapters_that_change_their_base_are_refused_on_either_side(
    options: dict[str, Any], why: str, tmp_path: Path
) -> None:
    student = adapted(LoraConfig(r=2, **TARGETS, **options), base=tiny_llama(TEACHER_ROWS, seed=5).float())
    with pytest.raises(ValueError, match=f"the student's adapter cannot share its base with a teacher: {why}"):
        shared_teacher(student)
    directory, student = saved(tmp_path, **options), adapted(KEPT["lora"])
    before = logits(student)
    with pytest.raises(ValueError, match=rf"the adapter in .* cannot share its base with a teacher: {why}"):
        shared_teacher(student, f"adapter:{directory}")
    assert torch.equal(logits(student), before)


def test_a_merged_adapter_is_refused() -> None:
    student = adapted(KEPT["lora"])
    student.merge_adapter()
    with pytest.raises(ValueError, match="merged into its base, which is then no teacher: unmerge_adapter"):
        shared_teacher(student)


def test_what_names_no_adapter_is_refused(tmp_path: Path) -> None:
    student = adapted(KEPT["lora"])
    for spec, message in (
        ("adapter:", "no adapter at ''"),
        (f"adapter:{tmp_path / 'nowhere'}", "no adapter at .*nowhere"),
        (f"adapter:{tmp_path}", "holds no model"),
        ("bases", "'bases' names no teacher on the student's weights: 'base', or 'adapter:DIR'"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            shared_teacher(student, spec)
    whole = tmp_path / "whole"
    tiny_llama(TEACHER_ROWS, seed=5).save_pretrained(whole)
    with pytest.raises(ValueError, match="is a whole model and no adapter: leave out 'adapter:'"):
        adapter_directory(f"adapter:{whole}")


MISFIT = "made for tiny, it does not fit a LlamaForCausalLM in memory"


def test_an_adapter_that_does_not_fit_the_base_is_refused_by_what_does_not(tmp_path: Path) -> None:
    spec = f"adapter:{saved(tmp_path, target_modules=['q_proj', 'lm_head'])}"
    with pytest.raises(ValueError, match=rf"the adapter of {tmp_path} cannot be used: {MISFIT}: .*lm_head.* is "):
        shared_teacher(tiny_llama(TEACHER_ROWS + 1, seed=5), spec)
    smaller = tiny_llama(TEACHER_ROWS, seed=5)
    del smaller.model.layers[0].self_attn.q_proj
    with pytest.raises(
        ValueError, match=rf"{MISFIT}: it has weights for model\.layers\.0\.self_attn\.q_proj, and the model no"
    ):
        shared_teacher(smaller, spec)
