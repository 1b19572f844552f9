"""The page at /docs: the OpenAPI document for people. One file of HTML, no script, nothing fetched from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from html import escape
from typing import Any

from core.openai.openapi import document

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733 }
h1 small { font-weight: normal; color: #66727f; font-size: 1rem }
h2 { margin-top: 2.5rem }
details { border: 1px solid #d5dbe1; border-radius: 6px; margin: .5rem 0; padding: 0 1rem }
summary { cursor: pointer; padding: .6rem 0 }
summary b { display: inline-block; width: 3.5rem; color: #0b6b3a }
summary b.post { color: #0b4f9e }
summary span { color: #66727f; margin-left: 1rem }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1rem }
th:first-child { width: 9rem }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; border-top: 1px solid #eceff2 }
pre { background: #f4f6f8; border-radius: 6px; padding: .8rem; overflow-x: auto }
code, pre { font: 14px/1.45 ui-monospace, monospace }
a { color: #0b4f9e }
@media (prefers-color-scheme: dark) {
  body { background: #14191f; color: #dbe2e9 } pre { background: #1e252d }
  details, th, td { border-color: #333d47 } a, summary b.post { color: #7db7ff } summary b { color: #6fd19b }
}
"""

_EXAMPLES: dict[str, dict[str, Any]] = {
    "ChatRequest": {"model": "MODEL", "messages": [{"role": "user", "content": "Hello!"}], "stream": True},
    "CompletionRequest": {"model": "MODEL", "prompt": "Once upon a time", "max_tokens": 32},
    "TokenizeRequest": {"prompt": "Hello!"},
    "DetokenizeRequest": {"tokens": [5, 6, 7]},
}


@cache
def encoded() -> bytes:
    """The page."""
    described = document()
    operations = [_operation(path, *one) for path, item in described["paths"].items() for one in item.items()]
    schemas = [_schema(name, schema) for name, schema in described["components"]["schemas"].items()]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Dynamo: HTTP API</title>',
            f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>',
            f"<h1>HTTP API <small>dynamo {escape(described['info']['version'])}</small></h1>",
            "<p>OpenAI's API: its clients work with this server's address followed by <code>/v1</code>. The machine's "
            'view of this page is <a href="openapi.json">openapi.json</a>. In the examples, SERVER is its address '
            'and MODEL one of <a href="v1/models">v1/models</a>.</p>',
            "<h2>Paths</h2>", *operations,
            "<h2>Bodies</h2>", *schemas, "</body></html>",
        ]
    ).encode()  # fmt: skip


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    rows = [
        (f"<code>{status}</code>", _text(answer["description"]), _bodies(answer))
        for status, answer in operation["responses"].items()
    ]
    name = _body_name(operation)
    body = "" if name is None else f"<p>Body: {_link(name)}</p><pre>{escape(_curl(path, _EXAMPLES[name]))}</pre>"
    title = f'<b class="{method}">{method.upper()}</b> <code>{escape(path)}</code>'
    summary = f"<summary>{title} <span>{escape(operation['summary'])}</span></summary>"
    return f"<details>{summary}{body}{_table(('Status', 'When', 'Body'), rows)}</details>"


def _schema(name: str, schema: dict[str, Any]) -> str:
    required = set(schema.get("required", ()))
    rows = [
        (
            f"<code>{escape(field)}</code>{' *' if field in required else ''}",
            " or ".join(_types(one)),
            _text(one.get("description", "")),
        )
        for field, one in schema["properties"].items()
    ]
    summary = f"<summary><code>{name}</code> <span>{_text(schema.get('description', ''))}</span></summary>"
    # A link to what is inside opens the section; one to the section itself would not.
    table = _table(("Field (* required)", "Type", "Meaning"), rows)
    return f'<details>{summary}<div id="{name}">{table}</div></details>'


def _types(schema: dict[str, Any]) -> Iterator[str]:
    """The words for what a value may be; null, which every optional field may be, is left out."""
    if "$ref" in schema:
        yield _link(schema["$ref"].rpartition("/")[2])
    elif "anyOf" in schema:
        for variant in schema["anyOf"]:
            yield from _types(variant)
    elif "enum" in schema:
        yield from (f"<code>{escape(json.dumps(value))}</code>" for value in schema["enum"] if value is not None)
    elif schema.get("type") == "array":
        yield f"list of ({' or '.join(_types(schema.get('items', {})))})"
    elif schema.get("type") != "null":
        yield escape(str(schema.get("type", "anything"))) + _bounds(schema)


def _bounds(schema: dict[str, Any]) -> str:
    words = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{escape(sign)}&nbsp;{schema[key]}" for key, sign in words.items() if key in schema]
    return f" {', '.join(bounds)}" if bounds else ""


def _bodies(answer: dict[str, Any]) -> str:
    kinds = answer.get("content", {}).items()
    return "<br>".join(
        _link(content["schema"]["$ref"].rpartition("/")[2]) if "$ref" in content["schema"] else f"<code>{kind}</code>"
        for kind, content in kinds
    )


def _body_name(operation: dict[str, Any]) -> str | None:
    if "requestBody" not in operation:
        return None
    name: str = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    return name


def _curl(path: str, body: dict[str, Any]) -> str:
    return f"curl -N SERVER{path} -H 'Content-Type: application/json' \\\n  -d '{json.dumps(body)}'"


def _text(words: str) -> str:
    """`code` between backticks, as in docstrings."""
    parts = escape(words).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _link(name: str) -> str:
    return f'<a href="#{name}">{name}</a>'


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [_row("th", head), *(_row("td", row) for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def _row(cell: str, values: tuple[str, ...]) -> str:
    return f"<tr>{''.join(f'<{cell}>{value}</{cell}>' for value in values)}</tr>"
