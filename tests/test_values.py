# SPDX-License-Identifier: Apache-2.0
"""The notation of values that cross the wall of a box: exact, and harmless to read whoever wrote it."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, namedtuple
from decimal import Decimal
from enum import Enum, IntEnum
from fractions import Fraction
from typing import Any

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from verl_rlar.sandbox import values
from verl_rlar.sandbox.values import NotData, Opaque, decode, encode, evaluate


def across(value: Any) -> Any:
    """What comes out on the other side."""
    return decode(json.loads(json.dumps(encode(value), allow_nan=False)))


texts = st.text(st.characters(codec=None))
numbers = st.integers() | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False) | st.fractions()
hashable = st.recursive(
    st.none()
    | st.booleans()
    | numbers
    | texts
    | st.binary()
    | st.decimals(allow_nan=False)
    | st.datetimes()
    | st.dates()
    | st.times()
    | st.timedeltas(),
    lambda inner: st.lists(inner, max_size=4).map(tuple) | st.frozensets(inner, max_size=4),
    max_leaves=6,
)
anything = st.recursive(
    hashable | st.binary().map(bytearray) | st.sets(hashable, max_size=4) | st.just(range(3, -9, -2)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(hashable, inner, max_size=4),
    max_leaves=12,
)
json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*values._DECODERS, "opaque", "name", "call", "attr"]) | texts, inner, max_size=2
        )
    ),
    max_leaves=10,
)


def alike(one: Any, two: Any) -> bool:
    """Equal, and of the same types all the way down."""
    if type(one) is not type(two) or one != two:
        return False
    if isinstance(one, (list, tuple)):
        return all(map(alike, one, two))
    if isinstance(one, dict):
        return all(map(alike, one, two)) and all(map(alike, one.values(), two.values()))
    return math.copysign(1, one) == math.copysign(1, two) if isinstance(one, float) else True


@given(anything)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_value_comes_back_as_it_was(value: Any) -> None:
    assert alike(across(value), value)


@given(json_like)
def test_whatever_is_read_is_a_value_or_no_data(data: Any) -> None:
    try:
        decode(data)
    except NotData:
        pass


def test_numbers_that_json_does_not_know_cross() -> None:
    assert math.isnan(across(math.nan)) and across([math.inf, -math.inf]) == [math.inf, -math.inf]


def test_whole_numbers_stay_whole_and_truth_stays_truth() -> None:
    for value in (1, 1.0, True, 10**5000, -(2**53), Fraction(3, 10**5000), Decimal("1E+7")):
        assert alike(across(value), value)


class Colour(IntEnum):
    RED = 3


class Loud(str):
    def __str__(self) -> str:
        raise AssertionError("ran")

    __repr__ = __len__ = __iter__ = __str__  # type: ignore[assignment]


Point = namedtuple("Point", "x y")


def test_subclass_crosses_as_its_base_and_runs_nothing() -> None:
    assert type(encode(Loud("x"))) is str
    assert alike(across([Counter("aab"), OrderedDict(a=1), Colour.RED]), [{"a": 2, "b": 1}, {"a": 1}, 3])
    assert alike(across(Point(1, 2)), (1, 2))


def test_value_that_cannot_cross_stays_behind_a_name() -> None:
    class Mine(Enum):
        A = object()

    back = across([Mine.A, len])
    assert [value.type_name for value in back] == ["Mine", "builtin_function_or_method"]
    assert isinstance(back[0], Opaque) and back[0] != across(Mine.A)


def test_iterators_are_taken_out_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(across(iter([1, 2]))) == [1, 2] and list(across({"a": 1}.items())) == [("a", 1)]
    monkeypatch.setattr(values, "MAX_ITEMS", 5)
    assert list(across(n for n in iter(int, 1))) == [0] * 5


def test_arrays_cross_with_type_and_shape() -> None:
    for array in (numpy.arange(6, dtype="int16").reshape(2, 3), numpy.array(["a", "bc"]), numpy.zeros((0, 2))):
        back = across(array)
        assert back.dtype == array.dtype and back.shape == array.shape and (back == array).all()
    assert alike(across([numpy.float32(0.5), numpy.int64(3), numpy.bool_(True)]), [0.5, 3, True])


def test_array_of_objects_is_refused() -> None:
    for dtype in ("|O", "O", "", "V8", "<x8"):
        with pytest.raises(NotData):
            decode({"array": [dtype, [1], [1]]})


def test_nesting_without_end_is_an_error_of_its_own() -> None:
    deep: list[Any] = []
    deep.append(deep)
    with pytest.raises(RecursionError):
        encode(deep)


@pytest.mark.parametrize(
    "data",
    [
        *({"name": "f"}, {"call": [{"name": "f"}, [], {}]}, {"attr": ["x", "upper"]}, {}, {"int": 1, "float": "1"}),
        *({"x": 1}, {"set": [[]]}, {"dict": [[1]]}, {"int": "x"}, {"range": [1, 2, 0]}, {"bytes": "0"}),
        *({"datetime": "x"}, {"fraction": "1e999999999"}, {"fraction": [1, 0]}, {"timedelta": [10**30, 0, 0]}),
        *(
            {"fraction": [1.5, 1]},
            {"array": ["<U999999999", [1], ["x"]]},
            {"array": ["<i8", [1], [{"int": "0x" + "f" * 99}]]},
        ),
    ],
)
def test_outside_nothing_is_evaluated(data: Any) -> None:
    with pytest.raises(NotData):
        decode(data)


def test_expressions_are_evaluated_in_their_namespace() -> None:
    namespace = {"f": lambda a, b=0: a - b}
    call = {"call": [{"name": "f"}, [{"int": "0x5"}], {"b": {"call": [{"name": "len"}, [{"tuple": [1, 2]}], {}]}}]}
    assert evaluate(call, namespace) == 3
    assert evaluate([call, {"attr": ["x", "upper"]}], namespace)[0] == 3
    assert evaluate({"call": [{"name": "f"}, [{"name": "#0"}], {}]}, namespace, {"#0": 7}) == 7
    with pytest.raises(NameError, match="'#1'"):
        evaluate({"name": "#1"}, namespace, {"#0": 7})
    with pytest.raises(NameError, match="'g'"):
        evaluate({"name": "g"}, namespace)
    with pytest.raises(NotData):
        evaluate({"nonsense": 1}, namespace)
