"""A calculator: sums, differences, products and quotients of numbers, and nothing that takes long.

The expression is a model's. It is parsed and never evaluated as Python.
"""

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

from trb.errors import InputError

__all__ = ["calculator"]

_LONGEST = 200
_OPERATIONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_SIGNS: dict[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculator(expression: str) -> str:
    """Calculate the value of an arithmetic expression.

    Args:
        expression: numbers, parentheses and the operators + - * /, such as "(12+30)/2".

    Returns:
        The value; a whole number is written as one.
    """
    if len(expression) > _LONGEST:
        raise InputError(f"expression has {len(expression)} characters; at most {_LONGEST} are read")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, OverflowError) as error:
        raise InputError(f"cannot calculate: {type(error).__name__}") from error
    if not math.isfinite(value):
        raise InputError(f"cannot calculate: the value is {value}")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _SIGNS:
            return _SIGNS[type(sign)](_value(operand))
        case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _OPERATIONS:
            return _OPERATIONS[type(operation)](_value(left), _value(right))
    raise InputError("cannot calculate: only numbers, parentheses and + - * / are known")
