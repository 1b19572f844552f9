"""Decodes request bodies. Whatever is in them, the outcome is a struct or one sentence with the field at fault."""

from __future__ import annotations

import re
from typing import Any, Generic, TypeVar

import msgspec

from core.messages import RequestRejected

T = TypeVar("T")

_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$\.?(?P<path>.*)`)?$", re.DOTALL)
_TYPES = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_SHOWN = 80


class BodyDecoder(Generic[T]):
    """Decodes JSON bodies into one struct type."""

    def __init__(self, type_: type[T]) -> None:
        self._decode = msgspec.json.Decoder(type_).decode
        self._type = type_

    def decode(self, raw: bytes) -> T:
        """The body as a struct. Raises `RequestRejected` with `param` set when a field is at fault."""
        try:
            return self._decode(raw)
        except msgspec.ValidationError as error:
            raise self._explain(str(error), raw) from None
        except RecursionError:
            raise RequestRejected("The JSON body is nested too deeply; flatten it.", code="invalid_json") from None
        except UnicodeDecodeError as error:
            message = f"The body is not valid UTF-8 ({error.reason}); send JSON encoded as UTF-8."
            raise RequestRejected(message, code="invalid_json") from None
        except msgspec.DecodeError as error:
            if not raw.strip():
                raise RequestRejected("The body is empty; send a JSON object.", code="invalid_json") from None
            raise RequestRejected(f"The body is not valid JSON: {error}.", code="invalid_json") from None

    def _explain(self, text: str, raw: bytes) -> RequestRejected:
        match = _AT.match(text)
        assert match is not None
        what, path = match["what"], match["path"] or ""
        if missing := re.match(r"Object missing required field `(.+)`", what):
            field = f"{path}.{missing[1]}" if path else missing[1]
            return RequestRejected(f"'{field}' is missing; it is required.", param=field, code="missing_field")
        name = f"'{path}'" if path else "The body"
        found = _shown(raw, path)
        if path.endswith("[...]"):  # a value of a mapping: msgspec does not say under which key
            path = path.removesuffix("[...]")
            name = f"A value of '{path}'"
        if wrong := re.match(r"Expected `(.+)`, got `(.+)`", what):
            expected = " or ".join(_TYPES.get(t, t) for t in wrong[1].split(" | ") if t != "null" or wrong[1] == "null")
            sentence = f"{name} must be {expected}, found {found or _TYPES.get(wrong[2], wrong[2])}."
        elif limit := re.match(r"Expected `\w+` (of length )?(>=|<=|>|<) (\S+)", what):
            words = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}[limit[2]]
            verb = "must have a length of" if limit[1] else "must be"
            sentence = f"{name} {verb} {words} {limit[3]}" + (f", found {found}." if found else ".")
        elif what.startswith("Invalid enum value"):
            allowed = ", ".join(repr(v) for v in _allowed(self._type, path))
            sentence = f"{name} must be one of {allowed}; found {found or what.removeprefix('Invalid enum value ')}."
        elif pattern := re.match(r"Expected `str` matching regex '(.*)'", what):
            sentence = f"{name} must match {pattern[1]}" + (f", found {found}." if found else ".")
        else:
            sentence = f"{name} is not acceptable: {what}."
        return RequestRejected(sentence, param=path or None, code="invalid_value")


def _steps(path: str) -> list[str | int]:
    return [int(index) if index else key for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path)]


def _shown(raw: bytes, path: str) -> str | None:
    """The value at fault as the client wrote it, when it can be named shortly."""
    if not path or "[...]" in path:
        return None
    try:
        value: Any = msgspec.json.decode(raw)
        for step in _steps(path):
            value = value[step]
        text = msgspec.json.encode(value).decode()
    except (msgspec.MsgspecError, LookupError, TypeError, RecursionError, ValueError):
        return None
    return text if len(text) <= _SHOWN else None


def _allowed(type_: type[Any], path: str) -> list[object]:
    """The values that the schema allows at a path."""
    (schema, *_), definitions = msgspec.json.schema_components([type_], ref_template="{name}")
    for step in _steps(path):
        schema = next((s for s in _variants(schema, definitions) if _under(s, step) is not None), {})
        schema = _under(schema, step) or {}
    values: list[object] = []
    for variant in _variants(schema, definitions):
        values += [v for v in variant.get("enum", []) if v is not None]
    return values


def _under(schema: dict[str, Any], step: str | int) -> dict[str, Any] | None:
    return schema.get("items") if isinstance(step, int) else schema.get("properties", {}).get(step)


def _variants(schema: dict[str, Any], definitions: dict[str, Any]) -> list[dict[str, Any]]:
    if "$ref" in schema:
        return _variants(definitions[schema["$ref"]], definitions)
    if "anyOf" in schema:
        return [v for s in schema["anyOf"] for v in _variants(s, definitions)]
    return [schema]
