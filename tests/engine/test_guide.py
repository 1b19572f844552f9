"""docs/write-an-engine.md says what the code does: its listings and tables are made from the code.

`python -m tests.engine.test_guide` brings it up to date.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from pathlib import Path

import msgspec
import pytest

from core.engine import EngineRegistry, EngineSpec, InvalidAdapter, Source
from core.engine.validate import ALWAYS, BY_ROLE
from core.messages import Capabilities, EngineConfig
from core.messages import engine as engine_messages
from dynamo.testing.kit import Conformance

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs/write-an-engine.md"


def marked(name: str) -> str:
    """What stands between the marks of this name."""
    text = GUIDE.read_text()
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    assert begin in text
    assert end in text
    return text.partition(begin)[2].partition(end)[0]


def first_sentence(doc: str | None) -> str:
    """Up to the first full stop, on one line."""
    sentence = re.match(r"(.+?\.)(\s|$)", " ".join((doc or "").split()))
    assert sentence, f"no sentence in {doc!r}"
    return sentence[1]


def hooks_table() -> str:
    """A line a hook, from its specification and the table of what needs it."""
    lines = ["| hook | needed | gives | does |", "|---|---|---|---|"]
    for name, spec in vars(EngineSpec).items():
        if not hasattr(spec, "dynamo_spec"):
            continue
        signature = inspect.signature(spec)
        arguments = ", ".join(parameter for parameter in signature.parameters if parameter != "self")
        roles = [role for role, hooks in BY_ROLE.items() if name in hooks]
        needed = "always" if name in ALWAYS else "optional"
        needed = f"role {' or '.join(f'`{role}`' for role in roles)}" if roles else needed
        needed = "`kv_events=True`" if name == "kv_events" else needed
        stream = re.fullmatch(r"AsyncIterator\[(\w+)\]", signature.return_annotation)
        gives = f"stream of `{stream[1]}`" if stream else f"`{signature.return_annotation}`"
        lines.append(f"| `{name}({arguments})` | {needed} | {gives} | {first_sentence(spec.__doc__)} |")
    return "\n".join(lines) + "\n"


def capabilities_table() -> str:
    """A line a capability, from the docstrings of the fields."""
    tree = ast.parse(Path(engine_messages.__file__).read_text())
    body = next(node.body for node in tree.body if getattr(node, "name", "") == "Capabilities")
    docs: dict[str, str] = {}
    for field, doc in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(doc, ast.Expr), f"{field.target.id} has no docstring"
            docs[field.target.id] = " ".join(ast.literal_eval(doc.value).split())
    lines = ["| capability | default | meaning |", "|---|---|---|"]
    for field in msgspec.structs.fields(Capabilities):
        value = getattr(Capabilities(), field.name)
        if field.name in ("sampling", "continues"):
            default = "all"
        elif isinstance(value, bool):
            default = f"`{value}`"
        else:
            default = ", ".join(f"`{item}`" for item in value) or "none"
        lines.append(f"| `{field.name}` | {default} | {docs[field.name]} |")
    return "\n".join(lines) + "\n"


def test_hooks_table():
    """The table of hooks is the specification's."""
    assert marked("hooks") == hooks_table()


def test_capabilities_table():
    """The table of capabilities is the struct's."""
    assert marked("capabilities") == capabilities_table()


def test_echo_listing():
    """The echo engine in the guide is the one in the examples."""
    source = (ROOT / "examples/echo-engine/echo_engine.py").read_text()
    assert marked("echo") == f"```python\n{source}```\n"


def test_first_ten_lines():
    """The first listing is refused with the very sentence that the guide shows."""
    text = GUIDE.read_text()
    listing, shown = re.search(r"```python\n(.+?)```", text, re.S), re.search(r"mine  refused\n  (.+)\n", text)
    assert listing
    assert shown
    assert len([line for line in listing[1].splitlines() if line]) <= 10
    names: dict[str, type] = {}
    exec(compile(listing[1], str(GUIDE), "exec"), names)
    with pytest.raises(InvalidAdapter) as refused:
        EngineRegistry(()).add(names["MyEngine"], Source("mine", "my-engine"))
    assert str(refused.value) == shown[1]


def test_settings_table():
    """Every setting of the kit is in the guide's table, with its default, and no other."""
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", GUIDE.read_text().partition("| setting |")[2], re.M))
    settings = {name for name in Conformance.__annotations__ if name != "kit"}
    table = {name: value for name, value in rows.items() if name in settings}
    assert table.keys() == settings
    for name in ("step_timeout", "start_timeout", "test_timeout", "stall_limit"):
        assert table[name] == f"{getattr(Conformance, name):g} s"
    assert table["logprob_tolerance"] == f"{Conformance.logprob_tolerance:g}"
    assert table["exclusive"] == f"`{Conformance.exclusive}`"


def test_names_exist():
    """What the guide names in `EngineConfig` exists."""
    fields = {field.name for field in msgspec.structs.fields(EngineConfig)}
    assert {"engine_args", "gpu_memory_utilization", "dtype", "max_model_len"} <= fields
    for method in re.findall(r"`config\.(\w+)\(", GUIDE.read_text()):
        assert callable(getattr(EngineConfig, method))


def main() -> None:
    """Writes the tables and the listing into the guide."""
    text = GUIDE.read_text()
    echo = (ROOT / "examples/echo-engine/echo_engine.py").read_text()
    parts = {"hooks": hooks_table(), "capabilities": capabilities_table(), "echo": f"```python\n{echo}```\n"}
    for name, part in parts.items():
        text = text.replace(f"<!-- {name} -->\n{marked(name)}", f"<!-- {name} -->\n{part}")
    GUIDE.write_text(text)


if __name__ == "__main__":
    main()
