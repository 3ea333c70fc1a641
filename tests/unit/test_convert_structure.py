"""Templates: what is taken apart is put together the same."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from deepopt.convert.structure import leaves, put_together, take_apart, template_leaves

Point = namedtuple("Point", ["x", "y"])


@dataclass
class Record:
    first: Any
    second: Any = None


def containers(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = st.text(max_size=3)
    return st.one_of(
        st.lists(parts, max_size=3),
        st.lists(parts, max_size=3).map(tuple),
        st.dictionaries(keys, parts, max_size=3),
        st.dictionaries(keys, parts, max_size=3).map(OrderedDict),
        st.builds(Point, parts, parts),
        st.builds(Record, parts, parts),
        st.builds(slice, parts, parts, parts),
    )


values = st.recursive(st.one_of(st.integers(), st.none(), st.text(max_size=2)), containers)


@given(values)
def test_taken_apart_and_put_together_is_the_same(value: Any) -> None:
    template = take_apart(value, lambda leaf: ("leaf", leaf))
    made = put_together(template, lambda leaf: leaf[1])
    assert made == value
    assert type(made) is type(value)


@given(values)
def test_leaves_of_a_value_and_of_its_template_have_one_order(value: Any) -> None:
    template = take_apart(value, lambda leaf: ("leaf", leaf))
    assert [("leaf", leaf) for leaf in leaves(value)] == list(template_leaves(template))
