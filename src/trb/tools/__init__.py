"""Tools that a model calls between its turns, and the few that recipes can name.

A tool is what TRL takes for one: a function with annotated arguments and a Google-style docstring. It is the user's own
code and runs as such; what it answers is text from outside, and is treated as that.
"""

from collections.abc import Callable
from typing import Any

from trb.tools.calculator import calculator

__all__ = ["TOOLS"]

TOOLS: dict[str, Callable[..., Any]] = {"calculator": calculator}
"""By the name that a recipe gives. Recipes are data and name nobody's code; other tools are passed in Python."""
