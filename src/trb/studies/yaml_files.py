"""YAML as recipes have it: safe, by YAML 1.2's rules, no key twice.

Left out: which keys there may be (`trb.studies.keys`), and bounds on size (`trb.safety.untrusted.parse_yaml`).
"""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from trb.errors import InputError, nearest
from trb.safety.untrusted import parse_yaml

__all__ = ["ConfigError", "Dumper", "read_value", "read_yaml"]


class ConfigError(InputError):
    """A recipe or an override that cannot be used; the message names the file, the key and the remedy."""


class _Loader(yaml.SafeLoader):
    """Safe YAML with two repairs: duplicate keys are errors, and plain scalars are read by YAML 1.2's rules."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML declares it as an attribute of instances)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []  # a key of YAML may be unhashable
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.append(key)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Safe YAML that quotes what either version's rules would not read back as text."""


# By YAML 1.1, PyYAML's own, `no` is false, `1e-5` is text, `1:30` is ninety and 2026-01-01 is a date.
_DIGITS = r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"

_FLOAT = rf"{_DIGITS}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"

for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    for _class in (_Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping as recipes have it: safe, by YAML 1.2's rules, no key twice. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        near = nearest(path.name, os.listdir(path.parent)) if path.parent.is_dir() and not path.exists() else ""
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}{near}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from error
    try:
        values = parse_yaml(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping, key: value, one to a line")
    return values


def read_value(text: str) -> Any:
    """A value of the command line as YAML; what is not YAML is itself."""
    if text.lower() in ("none", "null"):
        return None
    try:
        return parse_yaml(str(text), _Loader)
    except (yaml.YAMLError, ValueError):
        return str(text)
