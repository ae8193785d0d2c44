"""A notebook's parameters: types, bounds and declarations."""

import math

import pytest

from sgsc_study.parameters import check_bounds, coerce, declarations

SAME = {"int": [0, -3, 10**30], "float": [0.0, -1e300], "bool": [True, False], "str": ["", "1"], "list[int]": [[1, 2]]}
OTHER = {"int": [1.0, "1", True, None], "float": ["fast", True, "nan", math.inf, 10**400], "bool": [1], "str": [1]}
OTHER |= {"list[int]": [[], 1, "[1]", (1, 2), [1, "2"]], "complex": [1], "list": [[1]], "list[complex]": [[1]]}


def test_a_value_of_the_declared_type_stays_what_reads_as_a_float_becomes_one_and_the_rest_is_refused():
    assert all(coerce(value, kind) == value for kind, values in SAME.items() for value in values)
    for value, expected in (("1e-3", 0.001), (2, 2.0), ("7", 7.0)):
        assert type(coerce(value, "float")) is float and [expected] == coerce([value], "list[float]")
    for kind, value in ((kind, value) for kind, values in OTHER.items() for value in values):
        with pytest.raises(ValueError, match="should be"):
            coerce(value, kind)


BOUNDS = [  # type, help, what is within the bounds, what is not
    ("int", "", [1, 9], [0, -1]),
    ("int", "epochs, at least 4; those of the evaluation", [4], [3]),
    ("int", "at least 0, a multiple of 10", [0, 30], [15]),
    ("float", "", [0.0, 1e-9], [-1e-9]),
    ("float", "at least 0.5.", [0.5], [0.4]),
    ("str", "a folder", ["there"], [""]),
    ("str", "a URL; empty: a file", ["", "there"], []),
    ("bool", "", [True, False], []),
    ("list[int]", "each at least 2", [[2, 3]], [[2, 1]]),
]


@pytest.mark.parametrize(("kind", "said", "within", "beyond"), BOUNDS)
def test_bounds_are_those_that_the_help_says(kind, said, within, beyond):
    for value in within:
        check_bounds(value, kind, said)
    for value in beyond:
        with pytest.raises(ValueError, match="should"):
            check_bounds(value, kind, said)


def test_a_declaration_is_a_line_with_a_type_and_perhaps_a_help():
    cell = '# None: here\nlr: float = 1.0\nname: str = "a # b"  # a folder\nx = 1'
    assert declarations(cell) == {"lr": ("float", ""), "name": ("str", "a folder")}
