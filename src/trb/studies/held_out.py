"""Which of a recipe's prompts are trained on and which are held out, and what is said where too few are left.

Left out: reading them (`trb.tasks.prompts`).
"""

import random
from typing import TYPE_CHECKING

from trb.studies.keys import RunConfig
from trb.studies.yaml_files import ConfigError
from trb.tasks.conversations import conversation_of

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["set_aside", "too_few"]


def too_few(run: RunConfig, read: int, left: int, needed: int, more: str) -> str:
    """Why what is left to train on is less than a step, and what of it can be changed."""
    limited = f", as train_limit is {run.train_limit}" if read == run.train_limit else ""
    causes, remedies = [f"{read} prompts of {run.train_data} are read{limited}"], [more]
    if left < read:
        causes.append(f"overlong_prompts: drop leaves out {read - left} of more than {run.max_prompt_length} tokens")
        remedies.append("raise max_prompt_length")
    if run.held_out_prompts:
        causes.append(f"{run.held_out_prompts} are held out")
        remedies.append("lower held_out_prompts")
    return (
        f"{'; '.join(causes)}: fewer than the {needed} of one optimizer step are left; "
        f"{', '.join(remedies)} or lower prompts_per_step"
    )


def set_aside(prompts: "Dataset", run: RunConfig, more: str) -> tuple[list[int], list[int]]:
    """The rows to train on, and those of `held_out_prompts` different prompts that none of the former shares."""
    texts = [tuple((message["role"], message["content"]) for message in prompt) for prompt in prompts["prompt"]]
    # Without copies these are all rows, of which those are drawn that always were.
    different = sorted({text: index for index, text in reversed([*enumerate(texts)])}.values())
    if run.held_out_prompts > len(different):
        raise ConfigError(
            f"{run.train_data} has {len(different)} different prompts, and held_out_prompts is {run.held_out_prompts}; "
            f"{more}, or lower it"
        )
    held_out = sorted(random.Random(run.train_seed).sample(different, run.held_out_prompts))
    # Turns of one conversation share most of their text: what is held out of one is not trained on in another.
    conversations = [conversation_of(row) for row in prompts]
    seen = {conversations[index] for index in held_out} - {""}
    known = {texts[index] for index in held_out}
    kept = [index for index, text in enumerate(texts) if text not in known and conversations[index] not in seen]
    return kept, held_out
