"""A notebook's parameters: what a value should be, by the type and the help that its parameters cell declares.

A declaration is one line, `name: type = default  # help`. The help says the bounds in words, which papermill shows and
this module reads: "at least 4", "a multiple of 10", "may be empty" or "empty: what that means". Without a word an int
is at least 1, a float at least 0, and text is not empty.
"""

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

KINDS = {"int": int, "float": float, "str": str, "bool": bool}


def coerce(value: Any, kind: str) -> Any:
    """Return a parameter's `value` as the declared type `kind`, or raise ValueError: should be …, found ….

    Text that reads as a float becomes one where a float is declared, because YAML 1.1 takes 1e-3 for text.
    """
    if kind.startswith("list["):
        if not isinstance(value, list) or not value:
            raise ValueError(f"should be a non-empty {kind}. Found {value!r}.")
        return [coerce(item, kind[5:-1]) for item in value]
    if kind not in KINDS:
        raise ValueError(f"should be declared as {', '.join(KINDS)} or a list[...] of one. Found {kind}.")
    found = value
    if kind == "float" and type(value) in (int, str):
        with suppress(ValueError, OverflowError):
            value = float(value)
    if type(value) is not KINDS[kind] or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"should be of type {kind}, and finite. Found {found!r}.")
    return value


def check_bounds(value: Any, kind: str, said: str) -> None:
    """Raise ValueError where `value`, of the declared `kind`, is out of the bounds that its help text `said` sets."""
    least, multiple = re.search(r"at least (\d+(?:\.\d+)?)", said), re.search(r"a multiple of (\d+)", said)
    low = float(least[1] if least else "int" in kind)
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str) and not item and not re.search(r"\bempty:|may be empty", said):
            raise ValueError("should not be empty. Found ''.")
        if isinstance(item, int | float) and not isinstance(item, bool) and item < low:
            raise ValueError(f"should be ≥ {low:g}. Found {item!r}.")
        if multiple and item % int(multiple[1]):
            raise ValueError(f"should be a multiple of {multiple[1]}. Found {item!r}.")


def parameter_problems(declared: Mapping[str, tuple[str, str]], values: dict[str, Any]) -> list[str]:
    """What is wrong with `values` (coerced in place) of the `declared` parameters, {name: (type, help)}."""
    problems = []
    for name, value in values.items():
        try:
            if name not in declared:
                raise ValueError(f"is not a parameter of this notebook. It has: {', '.join(declared)}.")
            kind, said = declared[name]
            values[name] = coerce(value, kind)
            check_bounds(values[name], kind, said)
        except ValueError as error:
            problems.append(f"`{name}` {error}")
    return problems


def declarations(source: str) -> dict[str, tuple[str, str]]:
    """{name: (type, help)} of the parameters that a parameters cell declares, one a line."""
    lines = re.findall(r"^(\w+): ([\w\[\]]+) = .*?(?:  # (.*))?$", source, re.MULTILINE)
    return {name: (kind, said) for name, kind, said in lines}
