"""Models without weights: what a recipe's pair would be, without the memory to load it.

For `trb doctor`. An adapter is loaded with its base all the same, as its shape is not in its configuration.
"""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from trb.safety.untrusted import foreign_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trb.studies.keys import RunConfig

__all__ = ["outlined_pair", "outlined_pairs"]


def outlined_pairs(
    run: "RunConfig", *, weights: bool = True
) -> "dict[str | None, tuple[PreTrainedModel, PreTrainedModel]]":
    """`outlined_pair` with each teacher, by its name; None for the name of the only one."""
    from trb.training.routes import named_in_errors

    found = {}
    for name, pair in run.pairs().items():
        with named_in_errors(name):
            found[name] = outlined_pair(pair, weights=weights)
    return found


def outlined_pair(run: "RunConfig", *, weights: bool = True) -> "tuple[PreTrainedModel, PreTrainedModel]":
    """Student and teacher without weights; a teacher on the student's weights has those of the outline.

    With `weights=False` a directory that holds only a config.json will do, and the models of our recipes are known
    (`trb.planning.shapes`).
    """
    from trb.models.sharing import adapter_directory, is_shared, shared_teacher
    from trb.studies.material import load_pair
    from trb.studies.shared import check_shared, trains_own_adapter

    check_shared(run)
    if not is_shared(run.teacher):
        return outline(run, "student", weights=weights), outline(run, "teacher", weights=weights)
    if adapter_directory(run.teacher) is not None or trains_own_adapter(run):
        return load_pair(run, for_training=True)
    student = outline(run, "student", weights=weights)
    return student, shared_teacher(student, run.teacher)


def outline(run: "RunConfig", role: str, *, weights: bool = True) -> "PreTrainedModel":
    """One of the two, where it has weights of its own."""
    import torch
    from huggingface_hub.constants import HF_HUB_CACHE
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from trb.models.directories import check_config
    from trb.models.loading import load_model, resolve
    from trb.models.pruning import prune_depth
    from trb.planning.shapes import SHAPES

    spec, revision = getattr(run, role), getattr(run, f"{role}_revision")
    trust = getattr(run, f"{role}_trust_remote_code")
    keep = run.student_keep_layers if role == "student" else None
    if (Path(spec).expanduser() / "adapter_config.json").is_file():
        return load_model(spec, trust_remote_code=trust, keep_layers=keep, merge_adapter=role == "student")
    directory = Path(spec).expanduser()
    if not weights and revision is None and spec in SHAPES and not directory.exists():
        source, config = None, AutoConfig.for_model(**SHAPES[spec])
    else:
        shape_only = not weights and (directory / "config.json").is_file()
        if shape_only:
            foreign_directory(directory, also=Path(HF_HUB_CACHE))
        source = directory if shape_only else resolve(spec, revision)
        check_config(source, trust_remote_code=trust, revision=revision)
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust, revision=revision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id)
    if source is not None:
        with suppress(OSError):  # none was saved; the model's configuration names the stop ids
            model.generation_config = GenerationConfig.from_pretrained(source, revision=revision)
    return model if keep is None else prune_depth(model, keep)
