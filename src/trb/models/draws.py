"""What a pass in training mode draws at random, found, and switched off while a step is computed.

Setting every `nn.Dropout` to 0, as TRL does, leaves what families draw by a number of their own: dropout as a function,
of attention or between layers, layers that are skipped, jitter on what a router reads, and what PEFT keeps for each
adapter. Such a number is set to 0 where it stands, in modules and in configurations, since some families read it
there at every pass. It is for the time of a step alone: what is saved, and what a caller gets back, has the numbers
that it came with. Jitter is left as it is, and its module in evaluation mode: to PhiMoE it also says, in evaluation,
which experts come into question.

Left out: numbers by another name. `check_draws_off` meets them, once before training.

Shape suffixes: N completion tokens, H hidden size.
"""

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from trb.models.comparison import Trial, trials_of
from trb.models.generators import generators_kept
from trb.models.modeling import (
    UnsupportedModelError,
    completion_hidden_states,
    evaluation_mode,
    probe_rows,
    without_adapters,
)
from trb.models.rows import padded

__all__ = ["check_draws_off", "draws", "draws_off"]

_JITTER = ("jitter", "noise")
_TOKENS = 32  # of the row that `check_draws_off` reads: with as many keys, no dropout leaves all of them


def draws(model: nn.Module) -> bool:
    """Whether a pass in training mode may draw at random: by the model's options, its layers or an adapter's."""
    found = _found(model)
    options = (item for config in found.configs for item in vars(config).items())
    return bool(found.dropped or found.jittered) or any(_jitters(name) and _positive(value) for name, value in options)


@contextmanager
def draws_off(model: nn.Module) -> Iterator[None]:
    """Within the block passes in training mode compute what those in evaluation mode do, and can be trained through."""
    found = _found(model)
    before = [(place, name, place[name]) for place, name in found.dropped]
    hooks = [module.register_forward_pre_hook(_evaluate) for module in found.jittered]
    for place, name, _ in before:
        place[name] = 0.0
    try:
        yield
    finally:
        for place, name, value in before:
            place[name] = value
        for hook in hooks:
            hook.remove()
        for module in found.jittered:
            module.training = model.training


def check_draws_off(model: nn.Module) -> None:
    """Refuse a model that `draws_off` does not make the one that is sampled. Random states are left as they were.

    Raises:
        UnsupportedModelError: hidden states in training mode, so switched off, are others than in evaluation mode.
    """
    inner = without_adapters(model)
    if torch.equal(*_both(inner)):
        return
    with trials_of(inner) as trials:
        gap = next((gap for trial in trials if (gap := _gap(trial)) is not None), None)
    if gap is not None:
        raise UnsupportedModelError(
            model,
            f"with disable_dropout=True its training mode still gives other hidden states than it is sampled from (off "
            f"by {gap:.2g} of their spread); disable_dropout=False trains it as it is",
        )


def _gap(trial: Trial) -> float | None:
    """How far states in training mode are from those in evaluation mode; None where it is rounding."""
    with trial.precision():
        own_NH, trained_NH = _both(trial.model)
    return trial.gap([trained_NH], [own_NH])


def _both(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """`[N, H]` states of a row in evaluation mode, and in training mode with what it draws off."""
    row = probe_rows(model, 6)[0][:_TOKENS]
    batch = padded([row[:1]], [row[1:]], model.device)
    with torch.no_grad(), generators_kept(), evaluation_mode(model), draws_off(model):
        own_NH = completion_hidden_states(model, *batch)
        model.train()
        return own_NH, completion_hidden_states(model, *batch)


# ---- where the numbers stand ----

_Place = tuple[MutableMapping[str, Any], str]


class _Found(NamedTuple):
    dropped: list[_Place]  # the mappings and names under which positive numbers say what is dropped
    jittered: list[nn.Module]  # with noise of their own on what they read; only the model's layers know of it
    configs: list[PretrainedConfig]  # each once that a module of the model reads


def _found(model: nn.Module) -> _Found:
    """In one walk over the modules: a step asks anew, as numbers may be set between two."""
    dropped, jittered, configs = list[_Place](), list[nn.Module](), dict[int, PretrainedConfig]()
    for module in model.modules():
        options = vars(module)
        if "drop" in type(module).__name__.lower() and _positive(options.get("p")):
            dropped.append((options, "p"))
        if "config" in options:
            configs |= {id(config): config for config in _configs(options["config"])}
        names = " ".join(options)  # most modules have none of the words, and are asked no further
        if "drop" in names:
            dropped += _numbers(options, "drop")
        if _jitters(names) and any(_jitters(name) and _positive(value) for name, value in options.items()):
            jittered.append(module)
    dropped += (place for config in configs.values() for place in _numbers(vars(config), "drop"))
    return _Found(dropped, jittered, list(configs.values()))


def _numbers(options: MutableMapping[str, Any], word: str) -> Iterator[_Place]:
    for name, value in list(options.items()):
        if word in name:
            if _positive(value):
                yield options, name
            elif isinstance(value, dict):  # one for each of PEFT's adapters
                yield from ((value, each) for each in list(value) if _positive(value[each]))


def _configs(config: Any) -> Iterator[PretrainedConfig]:
    if isinstance(config, PretrainedConfig):
        yield config
        for part in vars(config).values():
            yield from _configs(part)


def _jitters(name: str) -> bool:
    return any(word in name for word in _JITTER)


def _evaluate(module: nn.Module, _arguments: Any) -> None:
    module.training = False


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
