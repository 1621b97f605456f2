# SPDX-License-Identifier: Apache-2.0
"""Values that cross the wall of a box, as JSON: by value, exactly, without pickle.

What JSON can say stands for itself; everything else is an object with one key, the tag::

    None True "text" 1 1.5 [..]           themselves (whole numbers stay whole)
    {"tuple": [..]} {"set": [..]} {"frozenset": [..]} {"dict": [[key, value], ..]} {"iterator": [..]}
    {"int": "-0x1f.."} {"float": "nan"} {"complex": [re, im]} {"bytes": hex} {"bytearray": hex} {"range": [a, b, c]}
    {"decimal": text} {"fraction": [n, d]} {"datetime" | "date" | "time": iso text} {"timedelta": [d, s, us]}
    {"array": [dtype, shape, nested lists]}    a numpy array
    {"opaque": type name}                      a value that cannot cross; it stays in its box

An *expression* may stand wherever a value may, and is evaluated in the namespace of the module in the box::

    {"name": "f"}   {"call": [f, [args], {keyword: value}]}   {"attr": [value, "name"]}
    {"name": "#2"}   what the job's third expression gave (counted from 0), the very object

An *answer* of mode ``calls`` is ``{"value": v}`` or ``{"raised": type name, "text": message}``.

Guarantees: standard library only (numpy is used if the value is numpy's); a subclass counts as its base (a Counter is a
dict), so that no method of a hostile class crosses; `decode` runs no code of the value, and takes time and memory
about linear in the size of the text (no chain of equal hashes, no division of endless numbers). This file is used on
both sides of the wall: `evaluate` is for the inside only.

Not covered: identity (two equal lists become two lists), cycles, functions, instances of a program's own classes.
"""

from __future__ import annotations

import builtins
import datetime
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from typing import Any

MAX_ITEMS = 1_000_000
"""Most items that are taken out of an iterator."""
EXACT = 2**53
MAX_BITS = 1 << 15
"""Bits of a whole number where it is divided (in a fraction, a range) or may be compared (in a set, as a key); a longer
one is `NotData` there."""
MAX_ALIKE = 64
"""Items of a set, or keys, with one and the same hash, which makes each of them wait for all others; more are
`NotData`."""
MAX_ARRAY = 64 << 20
"""Bytes of a numpy array."""
MAX_TEXT = 300
"""Characters of an exception's message that are kept."""


class NotData(ValueError):
    """What came over the wall is not in this notation."""


class Opaque:
    """Stands on the outside for a value that cannot cross; equal to nothing but itself."""

    def __init__(self, type_name: str) -> None:
        self.type_name = type_name

    def __repr__(self) -> str:
        return f"<{self.type_name} in its box>"


def encode(value: Any, opaque: Callable[[Any], Any] | None = None) -> Any:
    """A value in the notation above.

    Args:
        value: Any Python value.
        opaque: Says what stands for a value that cannot cross; None: ``{"opaque": type name}``.

    Raises:
        RecursionError: It is nested too deeply, or contains itself.
    """
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -EXACT < value < EXACT else {"int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is list:
        return [encode(item, opaque) for item in value]
    encoder = _ENCODERS.get(kind)
    if encoder is None:
        encoder = next((_ENCODERS[base] for base in kind.__mro__[1:-1] if base in _ENCODERS), None)
    if encoder is not None:
        return encoder(value, opaque)
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return encode(value.item(), opaque)
    if numpy is not None and isinstance(value, numpy.ndarray):
        return {"array": [value.dtype.str, list(value.shape), encode(value.tolist(), opaque)]}
    if hasattr(kind, "__next__") or kind in _VIEWS:
        return {"iterator": [encode(item, opaque) for item in islice(value, MAX_ITEMS)]}
    return opaque(value) if opaque else {"opaque": str(kind.__name__)[:MAX_TEXT]}


_VIEWS = {type({}.keys()), type({}.values()), type({}.items())}

_ENCODERS: dict[type, Callable[[Any, Any], Any]] = {
    bool: lambda v, o: bool(int.__index__(v)),
    int: lambda v, o: encode(int.__index__(v), o),
    float: lambda v, o: encode(float.__float__(v), o),
    str: lambda v, o: str.__str__(v),
    list: lambda v, o: [encode(item, o) for item in list.__iter__(v)],
    tuple: lambda v, o: {"tuple": [encode(item, o) for item in tuple.__iter__(v)]},
    set: lambda v, o: {"set": [encode(item, o) for item in set.__iter__(v)]},
    frozenset: lambda v, o: {"frozenset": [encode(item, o) for item in frozenset.__iter__(v)]},
    dict: lambda v, o: {"dict": [[encode(key, o), encode(item, o)] for key, item in dict.items(v)]},
    complex: lambda v, o: {"complex": [encode(v.real), encode(v.imag)]},
    bytes: lambda v, o: {"bytes": bytes.hex(v)},
    bytearray: lambda v, o: {"bytearray": bytearray.hex(v)},
    range: lambda v, o: {"range": [encode(v.start), encode(v.stop), encode(v.step)]},
    Decimal: lambda v, o: {"decimal": Decimal.__str__(v)},
    Fraction: lambda v, o: {"fraction": [encode(v.numerator), encode(v.denominator)]},
    datetime.datetime: lambda v, o: {"datetime": datetime.datetime.isoformat(v)},
    datetime.date: lambda v, o: {"date": datetime.date.isoformat(v)},
    datetime.time: lambda v, o: {"time": datetime.time.isoformat(v)},
    datetime.timedelta: lambda v, o: {"timedelta": [v.days, v.seconds, v.microseconds]},
}


def decode(data: Any, special: Callable[[str, Any], Any] | None = None) -> Any:
    """The value that `encode` has written.

    Args:
        data: JSON-like, hostile.
        special: Makes something of a tag that is none of a value's (an expression, ``opaque``): ``(tag, content)``.
            None: ``opaque`` becomes an `Opaque`, and expressions are refused.

    Raises:
        NotData: It is not in this notation.
        RecursionError: It is nested too deeply.
    """
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if isinstance(data, list):
        return [decode(item, special) for item in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise NotData(f"not a value: {str(data)[:80]}")
    ((tag, content),) = data.items()
    decoder = _DECODERS.get(tag)
    if special is not None:  # the errors of an expression are its own
        return decoder(content, special) if decoder else special(tag, content)
    if tag == "opaque" and isinstance(content, str):
        return Opaque(content[:MAX_TEXT])
    if decoder is None:
        raise NotData(f"unknown tag {tag[:80]!r}")
    try:
        return decoder(content, None)
    except NotData:
        raise
    except (TypeError, ValueError, ArithmeticError, LookupError, ImportError) as error:
        raise NotData(f"not a {tag}: {str(content)[:80]} ({error})") from None


def _items(content: Any, special: Any) -> list[Any]:
    if not isinstance(content, list):
        raise NotData("not a list")
    return [decode(item, special) for item in content]


def _whole(content: Any) -> int:
    """A whole number, never made of text: ``Fraction("1e999999999")`` is at work for hours."""
    value = decode(content)
    if not isinstance(value, int) or value.bit_length() > MAX_BITS:
        raise NotData("not a whole number of that many digits")
    return value


def _distinct(items: list[Any]) -> list[Any]:
    """Items of a set, or keys, if it does not take long to tell them apart."""
    hashes = list(map(hash, items))
    if len(set(hashes)) < len(items) and Counter(hashes).most_common(1)[0][1] > MAX_ALIKE:
        raise NotData("too many items have the same hash")
    todo = items
    while todo:
        if any(isinstance(item, int) and item.bit_length() > MAX_BITS for item in todo):
            raise NotData("a number in a set is too long")
        todo = [part for item in todo if isinstance(item, (tuple, frozenset)) for part in item]
    return items


def _dict(content: Any, special: Any) -> dict[Any, Any]:
    pairs = [(decode(key, special), item) for key, item in content]
    _distinct([key for key, _ in pairs])
    return {key: decode(item, special) for key, item in pairs}


def _leaves(nested: Any, depth: int) -> int:
    layer = [nested]
    for _ in range(depth):
        layer = [item for part in layer for item in (part if isinstance(part, list) else [part])]
    return len(layer)


def _array(content: Any, special: Any) -> Any:
    import numpy

    dtype, shape, nested = content
    if not isinstance(dtype, str) or dtype[1:2] not in set("biufcSUmM"):
        raise NotData("not an array of plain values")
    sizes = [size for size in shape if type(size) is int and size >= 0]
    items = math.prod(sizes)
    if len(sizes) != len(shape) or len(sizes) > 32 or items != _leaves(nested, len(sizes)):
        raise NotData("not an array of that shape")
    if numpy.dtype(dtype).itemsize * items > MAX_ARRAY:  # each item takes as much, whatever it holds
        raise NotData("not an array of that size")
    return numpy.array(decode(nested, special), dtype=dtype).reshape([int(size) for size in shape])


_DECODERS: dict[str, Callable[[Any, Any], Any]] = {
    "tuple": lambda c, s: tuple(_items(c, s)),
    "set": lambda c, s: set(_distinct(_items(c, s))),
    "frozenset": lambda c, s: frozenset(_distinct(_items(c, s))),
    "dict": _dict,
    "iterator": lambda c, s: iter(_items(c, s)),
    "int": lambda c, s: int(c, 16),
    "float": lambda c, s: float(c),
    "complex": lambda c, s: complex(decode(c[0]), decode(c[1])),
    "bytes": lambda c, s: bytes.fromhex(c),
    "bytearray": lambda c, s: bytearray.fromhex(c),
    "range": lambda c, s: range(*map(_whole, c)),
    "decimal": lambda c, s: Decimal(c),
    "fraction": lambda c, s: Fraction(*map(_whole, c)),
    "datetime": lambda c, s: datetime.datetime.fromisoformat(c),
    "date": lambda c, s: datetime.date.fromisoformat(c),
    "time": lambda c, s: datetime.time.fromisoformat(c),
    "timedelta": lambda c, s: datetime.timedelta(*map(_whole, c)),
    "array": _array,
}


def evaluate(expression: Any, namespace: Mapping[str, Any], earlier: Mapping[str, Any] | None = None) -> Any:
    """Evaluates an expression in a module's namespace. Inside a box only: it runs the module's code.

    Args:
        expression: JSON-like, in the notation above.
        namespace: The module's names.
        earlier: What earlier expressions gave, by names such as ``#2``.

    Raises:
        NameError: The module has no such name.
        NotData: It is no expression.
    """

    def special(tag: str, content: Any) -> Any:
        if tag == "name":
            for names in (earlier or {}, namespace):
                if content in names:
                    return names[content]
            if hasattr(builtins, content):
                return getattr(builtins, content)
            raise NameError(f"name {content!r} is not defined")
        if tag == "attr":
            owner, name = content
            return getattr(decode(owner, special), name)
        if tag == "call":
            function, args, kwargs = content
            return decode(function, special)(
                *(decode(arg, special) for arg in args),
                **{name: decode(arg, special) for name, arg in kwargs.items()},
            )
        raise NotData(f"unknown tag {tag[:80]!r}")

    return decode(expression, special)
