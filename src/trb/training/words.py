"""What the words and mappings of a configuration must be: each is refused by its own name, before anything reads it.

Those of TRL and transformers, which say of a value that it is none of theirs, or where its JSON ends, and not which
option has it. Left out: numbers (`trb.training.numbers`), and our own choices (`trb.training.config`).
"""

import dataclasses
import enum
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trb.errors import InputError, shown
from trb.safety.untrusted import parse_json, read_object
from trb.training.methods import check_choice

__all__ = ["check_words"]

_FILES = ("fsdp_config", "accelerator_config")  # what may also be the name of a file with such an object
_ANY_TEXT = ("deepspeed",)  # a file, or a whole configuration in base64


def check_words(args: Any) -> None:
    """Refuse a word that an option does not have, and text that is no mapping.

    Raises:
        InputError: names the option, what it must be, and what it is.
    """
    hints = typing.get_type_hints(type(args))
    for option in dataclasses.fields(args):
        value = getattr(args, option.name)
        words, is_mapping = _expected(hints[option.name], option.metadata.get("choices"))
        if words and value is not None:
            check_choice(option.name, value.value if isinstance(value, enum.Enum) else value, words)
        if is_mapping and isinstance(value, str) and value and option.name not in _ANY_TEXT:
            _check_mapping(option.name, value)


def _expected(hint: Any, choices: Iterable[str] | None) -> tuple[list[str], bool]:
    """The words that an option may be, if there are only some, and whether it may be a mapping."""
    kinds = [typing.get_origin(kind) or kind for kind in typing.get_args(hint) or (hint,)]
    names = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, enum.Enum)]
    return [str(each.value) for name in names for each in name] or list(choices or ()), dict in kinds


def _check_mapping(name: str, text: str) -> None:
    is_file = name in _FILES and not text.startswith("{")
    try:
        found = read_object(Path(text).expanduser()) if is_file else parse_json(text)
    except (ValueError, OSError) as error:
        found = error
    if not isinstance(found, dict):
        why = f" ({found})" if isinstance(found, Exception) else ""
        or_file = ", nor a file that holds one" if name in _FILES else ""
        raise InputError(f"{name} is {shown(text)}, which is no JSON object{or_file}{why}")
