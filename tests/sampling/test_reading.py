"""Which ways of reading a model are exact: the check that finds out, and the faults that it was written for.

The oracle of every law here is the model's own plain forward pass over one row, without cache, padding or batch. The
whole of the library goes through it in test_models.py.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_models
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import convert_outputs_to_fp32
from conftest import NO_SPECIAL_IDS, random_model, tiny_gpt2, tiny_llama
from peft import LoraConfig, get_peft_model
from tiny_models import build, found_way, plain_logits
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.masking_utils import eager_mask
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

import trb.sampling.attention
import trb.sampling.cache
from trb import zoo
from trb.models import passes
from trb.models.comparison import disagreement, tolerance, trials_of
from trb.models.modeling import (
    OutputHead,
    UnsupportedModelError,
    completion_hidden_states,
    probe_rows,
    rope_switch,
)
from trb.policies import StudentPolicy, TrustRegionPolicy
from trb.sampling import SAMPLERS, Rollout, sample
from trb.sampling.draw import accept_or_replace, inverse_cdf
from trb.sampling.reading import sampling_mode, way_of
from trb.sampling.uniforms import uniforms

PROMPTS = [[7], [4, 9, 2], [3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5, 9, 0], [11, 3, 8]]
STOP = 5
TOKENS = 9
POLICY = TrustRegionPolicy(0.3)
WAYS_OF_SAMPLING: list[dict[str, Any]] = [{"method": "lockstep"}, {"block_size": 3}, {"block_size": 4, "max_rows": 2}]


def draw(student: PreTrainedModel, teacher: PreTrainedModel, **options: Any) -> Rollout:
    return sample(student, teacher, PROMPTS, POLICY, max_new_tokens=TOKENS, eos_token_id=STOP, seed=3, **options)


def expected(student: PreTrainedModel, teacher: PreTrainedModel) -> list[list[int]]:
    """Token by token, one row at a time, one whole plain pass of each model for every token."""
    completions = []
    for key, prompt in enumerate(PROMPTS):
        completion: list[int] = []
        while len(completion) < TOKENS and STOP not in completion:
            tokens = [*prompt, *completion]
            log_student, log_teacher = (plain_logits(m, tokens)[-1:].log_softmax(-1) for m in (student, teacher))
            uniform = uniforms(3, *(torch.tensor([number]) for number in (key, 0, len(completion))))
            target = POLICY.target(log_student, log_teacher)
            draft = inverse_cdf(log_student.exp(), uniform[:, 0])
            token, _ = accept_or_replace(target, log_student, draft, uniform[:, 1], uniform[:, 2])
            completion.append(int(token))
        completions.append(completion)
    return completions


def way(model: PreTrainedModel) -> str:
    return found_way(model).name


def attention_of(model: PreTrainedModel) -> dict[str, str]:
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return {type(part).__name__: part.config._attn_implementation for part in parts}


def test_towers_keep_their_attention_and_the_first_sample_is_drawn_as_the_next() -> None:
    """A tower for sounds without SDPA refused ours when the rest had it already, which then stayed."""
    model = build("gemma4", seed=1)
    before = attention_of(model)
    for _ in range(2):
        assert way(model) == "slots"
        draw(model, model)
        assert attention_of(model) == before
    assert len(set(before.values())) > 1


def test_attention_comes_back_where_it_cannot_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gemma3_text")
    before = attention_of(model)

    def refusing(self: PreTrainedModel, *asked: Any) -> None:
        self.config._attn_implementation_internal = "half-way"
        raise ValueError("not for this part")

    monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", refusing)
    assert way(model) != "slots"
    assert attention_of(model) == before


# --- laws that were silently wrong --------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["olmo3", "gemma4_unified"])  # others: test_models
def test_windows_hold_in_prompts_and_after_them(model_type: str) -> None:
    """Prompts of up to three windows; these models are read through slots, not by a slower way."""
    student, teacher = build(model_type, seed=0), build(model_type, seed=1)
    assert way(student) == "slots"
    wanted = expected(student, teacher)
    for options in WAYS_OF_SAMPLING:
        assert draw(student, teacher, **options).completions == wanted


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_layers_that_share_keys_may_meet_prompts_of_one_token_first(model_type: str) -> None:
    """Nothing is read ahead of such a prompt: the slots are laid out before the library's own cache has shown how."""
    student, teacher = build(model_type, seed=0), build(model_type, seed=1)
    assert way(student) == "slots"
    wanted = expected(student, teacher)
    assert len(PROMPTS[0]) == 1
    assert draw(student, teacher, block_size=3, max_rows=1).completions == wanted
    ones = [prompt[:1] for prompt in PROMPTS]
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "eos_token_id": STOP, "seed": 3}
    rollouts = [sample(student, teacher, ones, POLICY, method=method, **options) for method in SAMPLERS]
    assert rollouts[0].completions == rollouts[1].completions
    assert len(set(map(len, rollouts[0].completions))) > 1  # so that slots are moved


def test_teacher_states_kept_for_the_loss_are_those_of_a_plain_pass_beyond_the_window() -> None:
    student, teacher = build("gemma3_text", seed=0), build("gemma3_text", seed=1)
    rollout = draw(student, teacher, block_size=3, keep_teacher_hidden=True)
    head = OutputHead.of(teacher)
    assert rollout.teacher_hidden is not None
    for prompt, completion, hidden in zip(PROMPTS, rollout.completions, rollout.teacher_hidden, strict=True):
        own = plain_logits(teacher, prompt + completion)[len(prompt) - 1 : -1]
        assert disagreement([head(hidden)], [own]) < tolerance(own)


def adapted(model: PreTrainedModel, targets: list[str]) -> Any:
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=targets == ["c_attn"])
    torch.manual_seed(0)
    return get_peft_model(model, config).double().eval()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_wrapped_models_are_read_at_their_positions(family: str) -> None:
    """PEFT's and torch.compile's wrappers hide the signature: without positions a padded row is another prefix."""
    make, targets = {"llama": (tiny_llama, ["q_proj", "v_proj"]), "gpt2": (tiny_gpt2, ["c_attn"])}[family]
    student, teacher = make(12, seed=1), adapted(make(12, seed=2), targets)
    merged = adapted(make(12, seed=2), targets).merge_and_unload()
    wanted = expected(student, merged)
    assert wanted != expected(student, make(12, seed=2))
    compiled = torch.compile(student, backend="eager")
    for options in WAYS_OF_SAMPLING:
        assert draw(student, teacher, **options).completions == wanted
        assert draw(compiled, teacher, **options).completions == wanted


@pytest.mark.parametrize("how", ["whole", "in place", "by layer"])
def test_compiled_models_are_sampled_as_they_were_written(how: str) -> None:
    """A cache of slots is written at places that a compiled pass would hold fixed."""
    student, teacher = tiny_llama(12, seed=1), tiny_llama(12, seed=2)
    wanted = expected(student, teacher)
    backend: Any = {"backend": "eager"}
    compiled: Any = student
    if how == "whole":
        compiled = torch.compile(student, **backend)
    elif how == "in place":
        student.compile(**backend)
    else:
        for layer in student.model.layers:
            layer.compile(**backend)
    compiled(torch.tensor([[1, 2, 3]]))
    for options in WAYS_OF_SAMPLING:
        assert draw(compiled, teacher, **options).completions == wanted


def longrope(seed: int) -> PreTrainedModel:
    return build("phi3-longrope", seed=seed)


def test_a_row_beyond_the_switch_of_its_rotary_factors_changes_no_other() -> None:
    """Some prompts are longer than the switch, some come to be, some never are; and no batch changes any of them."""
    student, teacher = longrope(0), longrope(1)
    switch = rope_switch(student)
    assert switch is not None
    lengths = [(len(prompt), len(prompt) + TOKENS) for prompt in PROMPTS]
    assert any(start > switch for start, _ in lengths) and any(start <= switch < end - 1 for start, end in lengths)
    wanted = expected(student, teacher)
    assert any(len(p) <= switch < len(p) + len(c) - 1 for p, c in zip(PROMPTS, wanted, strict=True))
    for options in WAYS_OF_SAMPLING:
        rollout = draw(student, teacher, **options)
        assert rollout.completions == wanted
        assert [len(row) for row in rollout.stats.accepted] == list(map(len, wanted))
        assert rollout.stopped == [completion[-1] == STOP for completion in wanted]


def test_the_loss_reads_each_token_with_the_factors_it_was_sampled_with() -> None:
    """At every completion token the law of a plain pass over the tokens before it, and no further."""
    model = longrope(0)
    rows = [(prompt, [1 + (3 * i + len(prompt)) % 11 for i in range(TOKENS)]) for prompt in PROMPTS]
    longest = max(len(p) + len(c) for p, c in rows)
    ids, mask, chosen = torch.zeros(3, len(rows), longest, dtype=torch.long)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[row, -end:], mask[row, -end:], chosen[row, -len(completion) :] = torch.tensor(prompt + completion), 1, 1
    ours = OutputHead.of(model)(completion_hidden_states(model, ids, mask, chosen))
    own = [plain_logits(model, p + c[:place])[-1] for p, c in rows for place in range(len(c))]
    torch.testing.assert_close(ours, torch.stack(own), rtol=1e-6, atol=1e-6)
    rollout = draw(model, longrope(1), block_size=3, keep_teacher_hidden=True)
    assert rollout.teacher_hidden is not None
    assert [len(states) for states in rollout.teacher_hidden] == list(map(len, rollout.completions))


def test_models_that_switch_at_different_lengths_each_switch_at_their_own() -> None:
    student, teacher = longrope(0), longrope(1)
    teacher.config.rope_parameters = {**teacher.config.rope_parameters, "original_max_position_embeddings": 7}
    teacher.config.original_max_position_embeddings = 7
    assert (rope_switch(student), rope_switch(teacher)) == (12, 7)
    wanted = expected(student, teacher)
    assert wanted != expected(student, longrope(1))
    for options in WAYS_OF_SAMPLING:
        assert draw(student, teacher, **options).completions == wanted


# --- attention that is neither sdpa nor eager ---------------------------------------------------


@pytest.fixture(params=["gemma2", "gpt_oss"])
def other_attention(request: pytest.FixtureRequest) -> Iterator[str]:
    """A stand-in for Flash Attention that knows what the model's own eager one knows: soft-capped scores, sinks."""
    own = {"gemma2": modeling_gemma2, "gpt_oss": modeling_gpt_oss}[request.param].eager_attention_forward

    def stand_in(*arguments: Any, **options: Any) -> Any:
        return own(*arguments, **options)

    AttentionInterface.register("stand_in", stand_in)
    AttentionMaskInterface.register("stand_in", eager_mask)
    yield request.param
    del AttentionInterface._global_mapping["stand_in"], AttentionMaskInterface._global_mapping["stand_in"]


def test_what_only_the_models_own_attention_knows_is_kept(other_attention: str) -> None:
    models = [build(other_attention, seed=seed) for seed in (0, 1)]
    for model in models:
        model.config.attn_logit_softcapping = 2.0
        for module in model.modules():
            if hasattr(module, "attn_logit_softcapping"):
                module.attn_logit_softcapping = 2.0
        model.set_attn_implementation("stand_in")
    wanted = expected(*models)
    assert draw(*models, block_size=3).completions == wanted
    assert [way(model) for model in models] == ["slots", "slots"]
    assert {model.config._attn_implementation for model in models} == {"stand_in"}


def test_eager_attention_in_float64_with_padding_leaves_no_nan() -> None:
    models = [build("gemma2", seed=seed) for seed in (0, 1)]
    for model in models:
        model.set_attn_implementation("eager")
    wanted = expected(*models)
    for options in WAYS_OF_SAMPLING:
        assert draw(*models, **options).completions == wanted


# --- recurrent and hybrid models ----------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen4_exp", "zaya", "rwkv", "recurrent_gemma"])
def test_states_of_rows_that_stop_early_do_not_hold_up_the_others(
    model_type: str, warnings_seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = build(model_type, seed=0), build(model_type, seed=1)
    wanted = expected(student, teacher)
    assert len(set(map(len, wanted))) > 1
    assert draw(student, teacher).completions == wanted
    assert way(student) != "slots"
    assert all(type(student).__name__ in text for text in warnings_seen) and warnings_seen
    if model_type == "qwen4_exp":
        assert "linear_attention" in warnings_seen[0]  # what stands beside it has another name in 5.16


def test_one_model_without_slots_puts_both_into_lockstep() -> None:
    student, teacher = build("llama", seed=0), build("qwen4_exp", seed=1)
    rollout = draw(student, teacher)
    assert rollout.completions == expected(student, teacher)
    assert rollout.teacher_calls >= max(map(len, rollout.completions))


# --- the check ----------------------------------------------------------------------------------


def test_a_mask_that_is_wrong_is_found_and_passed_over(
    warnings_seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever breaks the masks of slots again gets slower rollouts and a warning, not another law."""
    causal = trb.sampling.attention.at_own_positions

    def without_window(first_R: Tensor, mask_function: Any, **arguments: Any) -> Tensor:
        return causal(first_R, lambda row, head, query, key: key <= query, **arguments)

    monkeypatch.setattr(trb.sampling.attention, "at_own_positions", without_window)
    student, teacher = build("gemma3_text", seed=0), build("gemma3_text", seed=1)
    assert draw(student, teacher).completions == expected(student, teacher)
    assert way(student) == "lockstep"
    assert warnings_seen
    for text in warnings_seen:
        assert "Gemma3ForCausalLM" in text and "sliding_attention" in text and "lockstep" in text


@pytest.mark.parametrize("broken", [False, True])
def test_a_window_lost_in_half_precision_is_found_on_its_mask(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three keys too many among 64 make less difference than rounding may."""
    monkeypatch.setitem(tiny_models.TINY, "sliding_window", 64)
    model = build("gemma3_text").to(torch.bfloat16)
    if broken:
        exact = trb.sampling.attention.at_own_positions

        def without_window(first_R: Tensor, mask_function: Any, **arguments: Any) -> Tensor:
            return exact(first_R, lambda row, head, query, key: key <= query, **arguments)

        monkeypatch.setattr(trb.sampling.attention, "at_own_positions", without_window)
    assert way(model) == ("lockstep" if broken else "slots")


@pytest.mark.parametrize("broken", [False, True])
def test_windows_too_long_to_pass_through_are_checked_on_their_masks(
    broken: bool, warnings_seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MistralConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=4096,
        max_position_embeddings=20_000,
        **NO_SPECIAL_IDS,
    )
    model = random_model(MistralForCausalLM, config, 0, 0.3)
    if broken:
        exact = trb.sampling.attention.at_own_positions

        def one_too_many(first_R: Tensor, mask_function: Any, **arguments: Any) -> Tensor:
            return exact(first_R, lambda row, head, query, key: mask_function(row, head, query - 1, key), **arguments)

        monkeypatch.setattr(trb.sampling.attention, "at_own_positions", one_too_many)
    assert way(model) == ("lockstep" if broken else "slots")
    assert ["its mask differs at position" in text for text in warnings_seen] == [True] * broken


@pytest.mark.parametrize(
    ("model_type", "sizes", "wanted"),
    [
        ("llama4_text", {"floor_scale": 1500, "attention_chunk_size": 8000}, "lockstep without padding"),
        ("minimax_m3_vl_text", {"index_topk_blocks": 80, "index_block_size": 16}, "lockstep without padding"),
        ("gpt_neo", {"window_size": 1500}, "lockstep"),
    ],
)
def test_what_begins_beyond_every_short_row_and_in_no_mask_is_known(
    model_type: str, sizes: dict[str, int], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the sizes of real models: scaled queries, chosen blocks of keys, a window inside the attention itself."""
    for name, value in {**sizes, "max_position_embeddings": 8192}.items():
        monkeypatch.setitem(tiny_models.TINY, name, value)
    model = build(model_type)
    assert way(model) == wanted
    prompts = [[1 + (7 * place + row) % 23 for place in range(length)] for row, length in enumerate((1520, 1499, 9))]
    with sampling_mode(model), torch.no_grad():
        reader = way_of(model).reader
        assert reader is not None
        read = reader(model)
        found = [read.read_prompts(prompts), read.read_tokens(torch.tensor([3, 4, 5]))]
    for row, prompt in enumerate(prompts):
        own = plain_logits(model, [*prompt, 3 + row])[-2:]
        assert disagreement([torch.stack([logits[row] for logits in found])], [own]) < tolerance(own)


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """Tokens of every forward pass."""
    tokens: list[int] = []
    handle = model.base_model.register_forward_pre_hook(
        lambda _module, _arguments, options: tokens.append(options["input_ids"].numel()), with_kwargs=True
    )
    yield tokens
    handle.remove()


def test_models_are_checked_once_for_each_precision() -> None:
    model = tiny_llama(12, seed=1).float()
    with counted(model) as first:
        way(model)
    assert 0 < sum(first) < 200
    with counted(model) as again:
        way(model)
    assert again == []
    with counted(model) as lower, torch.autocast("cpu", torch.bfloat16):
        assert way(model) == "slots"
    assert lower


def test_the_check_can_be_switched_off_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRB_CHECK_READING", "0")
    model = tiny_llama(12, seed=1)
    with counted(model) as tokens:
        assert way(model) == "slots"
    assert tokens == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_trained_models_pass_in_the_precisions_they_run_in(name: str, dtype: torch.dtype) -> None:
    model, _ = zoo.load(name)  # type: ignore[arg-type]
    assert way(model.to(dtype)) == "slots"


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_mixed_precision_inside_a_wrapper_is_no_fault(name: str, warnings_seen: list[str]) -> None:
    """What the trainer samples from with bf16=True: float32 logits, with the rounding of bfloat16."""
    model, _ = zoo.load(name)  # type: ignore[arg-type]
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    assert plain_logits(model, [1, 2, 3]).dtype == torch.float32
    assert way(model) == "slots"
    assert OutputHead.check(model) and not warnings_seen


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_what_accelerate_prepared_is_sampled_through_slots_in_mixed_precision(
    name: str, warnings_seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its wrapper enters autocast again inside whatever the check has switched off around it."""
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # one of this process's trainers may have set another
    model, _ = zoo.load(name)  # type: ignore[arg-type]
    accelerator = Accelerator(mixed_precision="bf16")
    model = accelerator.prepare_model(model, evaluation_mode=True)
    wrapped = model.forward
    with accelerator.autocast(), trials_of(model) as trials:
        for trial, dtype in zip(trials, (torch.bfloat16, torch.float32), strict=True):
            with trial.precision():
                assert passes.plain_logits(model, [1, 2, 3]).dtype == dtype
    with accelerator.autocast():
        assert way(model) == "slots"
        assert OutputHead.check(model) and not warnings_seen
    assert model.forward == wrapped


def test_logits_that_a_family_widens_are_held_to_the_precision_they_have() -> None:
    wanted = way(build("mamba2"))
    model = build("mamba2").to(torch.bfloat16)
    assert plain_logits(model, [1, 2, 3]).dtype == torch.float32
    assert way(model) == wanted  # slots, but for transformers 5.16
    OutputHead.check(model)  # its residuals are float32, its head's weights are not


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lost_window_is_found_in_low_precision(dtype: torch.dtype) -> None:
    """The bound of the comparison lies between rounding and the smallest fault: keys just outside the window seen."""
    model = build("gemma3_text").to(dtype)
    rows = probe_rows(model, 6)
    own = [plain_logits(model, row)[-7:-1] for row in rows]
    for layer_type in ("sliding_attention",):
        assert layer_type in model.config.layer_types
    wider = build("gemma3_text").to(dtype)
    for module in wider.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = 6
    wider.config.sliding_window = 6
    fault = disagreement([plain_logits(wider, row)[-7:-1] for row in rows], own)
    rounding = disagreement([plain_logits(model, row[:-1])[-6:] for row in rows], [each[:6] for each in own])
    assert rounding < tolerance(own[0]) < fault


def test_logits_that_are_not_finite_are_infinitely_far() -> None:
    own = torch.tensor([[0.0, 1.0, -torch.inf]])
    assert disagreement([own], [own]) == 0
    assert disagreement([torch.tensor([[torch.nan, 1.0, 0.0]])], [own]) == torch.inf


def test_models_that_cannot_be_exact_are_refused_by_name() -> None:
    bert = BertLMHeadModel(BertConfig(vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=12, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    for model, name, reason in (
        (bert.eval(), "bert", "not causal"),
        (t5.eval(), "t5", "encoder-decoder"),
    ):
        for refused in (lambda model=model: way(model), lambda model=model: OutputHead.check(model)):
            with pytest.raises(UnsupportedModelError, match=rf"^{name} \({type(model).__name__}\).*{reason}"):
                refused()
        with pytest.raises(UnsupportedModelError, match=name):
            sample(model, None, [[1, 2]], StudentPolicy(), max_new_tokens=2, eos_token_id=0)


def test_a_model_whose_weights_are_lost_is_not_called_a_kind_that_is_not_supported() -> None:
    lost = tiny_llama(12, seed=1)
    with torch.no_grad():
        lost.lm_head.weight[3] = torch.nan
    calls = (
        lambda: way(lost),
        lambda: OutputHead.check(lost),
        lambda: sample(lost, None, [[1, 2]], StudentPolicy(), max_new_tokens=2, eos_token_id=0),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"LlamaForCausalLM is damaged: NaN or infinity in lm_head\.weight, and"):
            call()


def test_probe_rows_pass_every_window_that_can_be_afforded() -> None:
    assert [len(row) for row in probe_rows(build("gemma3_text"), 6)] == [tiny_models.WINDOW + 9, 7, 10, 10]
    short = tiny_gpt2(12, seed=1)  # 32 positions
    assert max(map(len, probe_rows(short, 6))) <= 32
    for row in probe_rows(short, 6):
        assert all(0 <= token < 12 for token in row) and len(set(row)) > 3


def test_a_router_that_reports_is_sampled_like_one_that_does_not() -> None:
    """`output_router_logits=True` asks each pass for a loss, which no pass of a sampler has the inputs for."""
    models = [build("mixtral", seed=seed) for seed in (0, 1)]
    wanted = expected(*models)
    for model in models:
        model.config.output_router_logits = True
    for options in WAYS_OF_SAMPLING:
        assert draw(*models, **options).completions == wanted


def test_prompts_are_read_in_the_precision_that_a_trainer_wraps_around_the_model() -> None:
    """Accelerate puts autocast around the forward pass of the whole model, not of the decoder inside it."""
    model = tiny_llama(12, seed=1).float()
    own = model.forward

    @functools.wraps(own)
    def in_bfloat16(*arguments: Any, **options: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return own(*arguments, **options)

    model.forward = in_bfloat16
    reader = trb.sampling.cache.SlotReader(model, 1)
    with sampling_mode(model), torch.no_grad():
        reader.admit([[3, 1, 4]], [0])
    assert {layer.keys.dtype for layer in reader._all_layers()} == {torch.bfloat16}


def test_a_model_with_too_few_positions_to_be_tried_is_refused_by_name() -> None:
    config = GPT2Config(vocab_size=12, n_embd=16, n_layer=1, n_head=2, n_positions=5, **NO_SPECIAL_IDS)
    with pytest.raises(UnsupportedModelError, match=r"^gpt2 .* has 5 positions, and 7 are needed"):
        way(random_model(GPT2LMHeadModel, config, 0, 0.3))
