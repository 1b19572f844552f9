"""What the fields of a struct mean, in the words of its source: for `dynamo graph --keys` and for /docs."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from functools import cache

import msgspec


@cache
def field_docs(struct: type[msgspec.Struct]) -> Mapping[str, str]:
    """The string below each field of a struct, base classes included, by field name."""
    docs: dict[str, str] = {}
    for base in reversed(struct.__mro__):
        if not (isinstance(base, type) and issubclass(base, msgspec.Struct)) or base is msgspec.Struct:
            continue
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):
            continue
        body = ast.parse(source).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                docs[field.target.id] = " ".join(below.value.value.split())
    return docs
