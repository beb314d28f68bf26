"""Hidden states and output heads, against each model's own logits computed one unpadded row at a time."""

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    XLMConfig,
    XLMWithLMHeadModel,
)

from trb.models.modeling import OutputHead, UnsupportedModelError, completion_hidden_states, length_groups
from trb.models.passes import cache_name
from trb.policies import StudentPolicy, TeacherPolicy
from trb.sampling import sample
from trb.sampling.scoring import score_completions
from trb.vocab import SharedVocabulary

SIZES = {
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
}
ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gpt2 (learned positions)": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=19, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    ),
    "gemma2 (soft-capped logits)": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=0.5)),
    "cohere (scaled logits)": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3)),
    "granite (divided logits)": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return ARCHITECTURES[name]().double().eval()


def test_the_cache_of_a_model_goes_by_the_name_its_library_gives_it() -> None:
    """XLM has had an argument `cache` before the rename, a dictionary of another kind."""
    for name in ARCHITECTURES:
        model = build(name)
        ids = torch.tensor([[3, 4, 5, 6]])
        cache = DynamicCache()
        model(ids[:, :3], use_cache=True, **{str(cache_name(model)): cache})
        last = model(ids[:, 3:], use_cache=True, **{str(cache_name(model)): cache}).logits[0, -1]
        torch.testing.assert_close(last, model(ids, use_cache=False).logits[0, -1])
    assert cache_name(XLMWithLMHeadModel(XLMConfig(vocab_size=19, emb_dim=8, n_layers=1, n_heads=1))) is None


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_completion_hidden_states_are_those_of_unpadded_rows(name: str) -> None:
    """Prompts padded on the left, completions on the right, lengths in no order, one row without a completion."""
    model = build(name)
    prompts = [[3, 4, 5, 6], [9], [12, 13], [1, 2, 3], [7, 7], [5]]
    completions = [[7, 8], [10, 11, 2, 3, 4], [], [5], [1, 2, 3], [6, 6]]
    ids, mask, chosen = torch.zeros(3, 6, 9, dtype=torch.long)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids[row, 4 - len(prompt) : 4 + len(completion)] = torch.tensor(prompt + completion)
        mask[row, 4 - len(prompt) : 4 + len(completion)] = 1
        chosen[row, 4 : 4 + len(completion)] = 1
    with torch.no_grad():
        ours = OutputHead.of(model)(completion_hidden_states(model, ids, mask, chosen))
        expected = [
            model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
    assert torch.allclose(ours, torch.cat(expected), atol=1e-9)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 9, 16])
def test_rows_are_read_in_as_many_passes_as_announced(rows: int) -> None:
    model = build("llama")
    passes: list[int] = []
    model.base_model.register_forward_hook(lambda *_: passes.append(1))
    ids = torch.ones(rows, 3, dtype=torch.long)
    completion_hidden_states(model, ids, ids, ids.clone().index_fill_(1, torch.tensor([0]), 0))
    assert len(passes) == length_groups(rows)


def test_a_head_that_differs_from_the_model_is_refused_by_name() -> None:
    model = build("gemma2 (soft-capped logits)")
    model.config.final_logit_softcapping = 5.0  # the module keeps reading the config, so it changes too
    OutputHead.check(model)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * (2.0 if output.dim() == 3 else 1.0))
    original = OutputHead.__call__
    try:
        OutputHead.__call__ = lambda self, hidden: original(self, hidden) * 1.01  # type: ignore[method-assign]
        with pytest.raises(ValueError, match="Gemma2ForCausalLM"):
            OutputHead.check(model)
    finally:
        OutputHead.__call__ = original  # type: ignore[method-assign]


@pytest.mark.parametrize("value", [False, None])
@pytest.mark.parametrize("model_type", ["qwen3", "mamba"])  # the library cannot call the first, and can the second
def test_a_model_that_answers_in_tuples_is_refused_with_what_to_set(model_type: str, value: bool | None) -> None:
    model, other = (tiny_models.build(model_type, seed) for seed in (0, 1))
    model.config.return_dict = value
    message = rf"^{model_type} \(.*return_dict={value}: .*model\.config\.return_dict=True"
    options = {"max_new_tokens": 2, "eos_token_id": 0}
    with pytest.raises(UnsupportedModelError, match=message):
        sample(model, None, [[1, 2]], StudentPolicy(), **options)
    with pytest.raises(UnsupportedModelError, match=message):
        sample(other, model, [[1, 2]], TeacherPolicy(), **options)
    with pytest.raises(UnsupportedModelError, match=message):
        OutputHead.check(model)
    with pytest.raises(UnsupportedModelError, match=message):
        score_completions(
            other,
            model,
            [[1, 2]],
            [[3, 0]],
            policy=TeacherPolicy(),
            vocabulary=SharedVocabulary.of([tiny_models.VOCABULARY], 0),
        )
    model.config.return_dict = True
    assert sample(model, None, [[1, 2]], StudentPolicy(), **options).completions


def test_checking_leaves_training_mode_as_it_was() -> None:
    model = build("llama").train()
    OutputHead.check(model)
    assert model.training


def test_adapters_take_part_in_the_hidden_states() -> None:
    model = build("llama")
    ids, mask, chosen = torch.tensor([[[1, 2, 3, 4]], [[1, 1, 1, 1]], [[0, 0, 1, 1]]])
    before = completion_hidden_states(model, ids, mask, chosen)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    after = completion_hidden_states(adapted, ids, mask, chosen)
    assert (before - after).abs().max() > 1e-4
