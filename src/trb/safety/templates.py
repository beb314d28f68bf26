"""Chat templates of others, tried once in a process that can be ended before they run in this one.

A chat template is a program that comes with a tokenizer. transformers renders it in jinja2's sandbox, which keeps it
away from files, modules and the attributes of Python objects, and bounds `range`; nothing bounds its time or memory,
and two nested loops or a string multiplied by a billion would stop a run. So a new template first renders a few
ordinary conversations in a child process with limits, and is refused if it breaks one.

Left out on purpose: rendering every prompt there. A template that behaves on these conversations and not on yours can
still waste the run's time, as a recipe can; it cannot do anything else.
"""

import json
import os
import subprocess
import sys
from functools import lru_cache
from typing import Any

from trb.errors import InputError, OperationError
from trb.safety import confinement

__all__ = ["CONVERSATIONS", "PLAIN_TEMPLATE", "check_chat_template"]

PLAIN_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if not loop.last %}\n\n{% endif %}{% endfor %}"

SECONDS = 10  # of processor time; the templates of published models take a few milliseconds
_WALL_SECONDS = 120  # for a machine that is busy with something else
_MEMORY_MB = 2048
_MOST_CHARACTERS = 1_000_000

_QUESTION = {"role": "user", "content": "What is 1 + 1?"}
_REPLY = {"role": "assistant", "content": "2"}
CONVERSATIONS = (
    [_QUESTION],
    [{"role": "system", "content": "Answer briefly."}, _QUESTION],
    [_QUESTION, _REPLY, _QUESTION],
)
_BOOT = confinement.boot("trb.safety.templates", "_try")


def check_chat_template(template: str | dict[str, str] | None, source: str) -> None:
    """Refuse templates that do not end, need too much memory, write too much or reach out of the sandbox.

    A tokenizer has none, one, or several by name. Templates that refuse a conversation (some know no system message)
    pass. Raises ValueError naming `source`.
    """
    texts = template.values() if isinstance(template, dict) else () if template is None else (template,)
    for text in texts:
        if problem := _problem(text):
            raise InputError(f"the chat template of {source} is not used: {problem}")


@lru_cache(maxsize=64)
def _problem(template: str) -> str:
    """What is wrong with a template, or nothing."""
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-c", _BOOT, json.dumps([[str(entry) for entry in sys.path]])],
            input=json.dumps(template),
            capture_output=True,
            encoding="utf-8",
            env=confinement.permitted_environment(os.environ),
            timeout=_WALL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"it does not render within {_WALL_SECONDS} seconds"
    if child.returncode < 0:  # by the kernel: RLIMIT_CPU is the limit that ends a process
        return f"it does not render within {SECONDS} seconds of processor time"
    if child.returncode:
        raise OperationError(f"the process that tries chat templates failed: {child.stderr[-2000:].strip()}")
    return json.loads(child.stdout)["problem"]


# ---- the child ----


def _try() -> None:
    """Render the conversations with the template on standard input; say on standard output what is wrong."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template: str = json.loads(sys.stdin.read())
    confinement.limit_resources(_MEMORY_MB, seconds=SECONDS)
    problem = ""
    for conversation in CONVERSATIONS:
        problem = problem or _rendering_problem(render_jinja_template, conversation, template)
    print(json.dumps({"problem": problem}))


def _rendering_problem(render: Any, conversation: list[dict[str, str]], template: str) -> str:
    from jinja2.exceptions import SecurityError

    try:
        rendered, _ = render(conversations=[conversation], chat_template=template, add_generation_prompt=True)
    except SecurityError as error:
        return f"it reaches out of its sandbox ({error})"
    except (MemoryError, OverflowError) as error:
        return f"it asks for too much ({str(error) or f'more than {_MEMORY_MB} MB'})"
    except Exception:  # how templates refuse a conversation, and how a wrong one says so when it is used
        return ""
    long = len(rendered[0]) > _MOST_CHARACTERS
    return f"it writes {len(rendered[0]):,} characters for a short conversation" if long else ""
