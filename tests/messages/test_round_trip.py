"""Every message survives msgpack and JSON unchanged, whatever it holds."""

from __future__ import annotations

import types
import typing
from enum import Enum
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import core.messages
from core.messages import KvCleared, KvEventBatch, KvRemoved, KvStored

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
"""What a field of type `Any` may hold."""
SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    # Engines' hashes are signed or unsigned 64-bit numbers.
    int: st.integers(-(2**63), 2**64 - 1),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(max_size=8),
    bool: st.booleans(),
    bytes: st.binary(max_size=8),
    type(None): st.none(),
    Any: PLAIN,
}

STRUCTS = [
    kind
    for kind in (getattr(core.messages, name) for name in core.messages.__all__)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
]


def values(of: Any) -> st.SearchStrategy[Any]:
    """Values of an annotated type."""
    if of in SCALARS:
        return SCALARS[of]
    origin, inner = typing.get_origin(of), typing.get_args(of)
    if origin in (types.UnionType, typing.Union):
        return st.one_of([values(kind) for kind in inner])
    if origin is typing.Literal:
        return st.sampled_from(inner)
    if origin is list:
        return st.lists(values(inner[0]), max_size=3)
    if origin is frozenset:
        return st.frozensets(values(inner[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(values(inner[0]), values(inner[1]), max_size=3)
    if origin is tuple and inner[-1] is ...:
        return st.lists(values(inner[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, inner))
    if issubclass(of, Enum):
        return st.sampled_from(of)
    return instances(of)


def instances(kind: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    """Instances of a struct, optional fields left out or not."""
    hints = typing.get_type_hints(kind)
    required = {f.name: values(hints[f.name]) for f in msgspec.structs.fields(kind) if f.required}
    optional = {f.name: values(hints[f.name]) for f in msgspec.structs.fields(kind) if not f.required}
    return st.fixed_dictionaries(required, optional=optional).map(lambda fields: kind(**fields))


@pytest.mark.parametrize("kind", STRUCTS, ids=lambda kind: kind.__name__)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_round_trip(kind: type[msgspec.Struct], data: st.DataObject):
    """Decoding what was encoded gives the same message, in both formats."""
    message = data.draw(instances(kind))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=kind) == message
    assert msgspec.json.decode(msgspec.json.encode(message), type=kind) == message


@settings(deadline=None)
@given(st.lists(st.one_of(*map(instances, (KvStored, KvRemoved, KvCleared))), max_size=4))
def test_events_keep_their_kind(events: list[Any]):
    """A batch of mixed events comes back as the kinds that went in."""
    batch = msgspec.msgpack.decode(msgspec.msgpack.encode(KvEventBatch(0, events)), type=KvEventBatch)
    assert [type(event) for event in batch.events] == [type(event) for event in events]


@pytest.mark.parametrize("kind", STRUCTS, ids=lambda kind: kind.__name__)
def test_unknown_fields_are_ignored(kind: type[msgspec.Struct]):
    """A newer peer may send more than this version knows."""
    assert not kind.__struct_config__.forbid_unknown_fields


def test_defaults_cost_nothing_on_the_wire():
    """A token's delta is small: fields that hold their default are not sent."""
    assert len(msgspec.msgpack.encode(core.messages.Delta([1234]))) <= 16
