"""Tool calls: recognized in every split, and whatever is no proper call stays text."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.messages import ConfigError
from core.openai.events import Content, Event, Reasoning, TextParser, ToolArguments, ToolStart
from core.openai.reasoning import ThinkParser
from core.openai.tool_calls.calls import CallWriter
from core.openai.tool_calls.forced import ListedCallParser, NamedCallParser
from core.openai.tool_calls.formats import FORMATS, ToolCallFormat, by_name, detect, register

TOOLS = frozenset({"get_weather", "add"})
CUTS = st.lists(st.integers(1, 9), max_size=80)


@dataclass
class Seen:
    content: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)


def writer(*, eager: bool = True, limit: int | None = None) -> CallWriter:
    return CallWriter(TOOLS, eager=eager, limit=limit)


def run(parser: TextParser, text: str, cuts: list[int]) -> Seen:
    events: list[Event] = []
    for cut in cuts:
        if text:
            events += parser.push(text[:cut])
        text = text[cut:]
    if text:
        events += parser.push(text)
    events += parser.finish()
    seen = Seen()
    for event in events:
        match event:
            case Content(text):
                assert text
                seen.content += text
            case Reasoning(text):
                assert text
                seen.reasoning += text
            case ToolStart(index, id_, name):
                assert index == len(seen.calls)
                assert id_.startswith("call_")
                seen.calls.append([name, ""])
            case ToolArguments(index, text):
                assert index == len(seen.calls) - 1, "arguments belong to the call that is open"
                seen.calls[index][1] += text
    return seen


HERMES = [
    ('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', "", [["add", '{"a": 1}']]),
    (
        'Let me see.\n<tool_call>{"arguments": {"city": "Paris }\\" {"}, "name": "get_weather"}</tool_call>\n'
        '<tool_call>{"name": "add", "arguments": {}}</tool_call>\n',
        "Let me see.",
        [["get_weather", '{"city": "Paris }\\" {"}'], ["add", "{}"]],
    ),
    ('<tool_call>{"name": "add"}</tool_call>', "", [["add", "{}"]]),
    ('<tool_call>{"name": "add", "arguments": null}</tool_call>', "", [["add", "{}"]]),
    ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 2}"}</tool_call>', "", [["add", '{"a": 2}']]),
    ('<tool_call>{"id": 7, "x": [1, {"name": "no"}], "name": "add", "arguments": {}}</tool_call>', "", [["add", "{}"]]),
    ('<tool_call>{"name": "add", "arguments": {"é東": "😀"}}', "", [["add", '{"é東": "😀"}']]),
    ("no call < at <tool all\n\n", "no call < at <tool all\n\n", []),
    ('<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',) * 2 + ([],),
    ('<tool_call>{"name": 3, "arguments": {}}</tool_call> and on',) * 2 + ([],),
    ("<tool_call>not json</tool_call>",) * 2 + ([],),
    ('<tool_call>{"arguments": {}}</tool_call>',) * 2 + ([],),
    ('say <tool_call>{"na',) * 2 + ([],),
]


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize(("text", "content", "calls"), HERMES)
@given(cuts=CUTS)
def test_hermes(text: str, content: str, calls: list[list[str]], eager: bool, cuts: list[int]):
    seen = run(by_name("hermes").make(writer(eager=eager)), text, cuts)
    assert seen.calls == calls
    assert seen.content.split() == content.split()


LLAMA = [
    ('{"name": "add", "parameters": {"a": 1}}', "", [["add", '{"a": 1}']]),
    (' <|python_tag|>{"name": "add", "parameters": {"a": 1}}', "", [["add", '{"a": 1}']]),
    (
        '{"name": "add", "parameters": {"a": 1}}; {"type": "function", "name": "get_weather", "parameters": {}}',
        "",
        [["add", '{"a": 1}'], ["get_weather", "{}"]],
    ),
    ("The answer is {3}.", "The answer is {3}.", []),
    ('{"answer": 42}', '{"answer": 42}', []),
    ('{"name": "stranger", "parameters": {}}', '{"name": "stranger", "parameters": {}}', []),
    ('{"name": "ad', '{"name": "ad', []),
    ("", "", []),
]


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize(("text", "content", "calls"), LLAMA)
@given(cuts=CUTS)
def test_llama3(text: str, content: str, calls: list[list[str]], eager: bool, cuts: list[int]):
    seen = run(by_name("llama3_json").make(writer(eager=eager)), text, cuts)
    assert (seen.content, seen.calls) == (content, calls)


def test_a_call_cut_off_in_its_arguments_is_shown_as_far_as_it_came_when_streaming():
    text = '<tool_call>{"name": "add", "arguments": {"a": [1, 2'
    assert run(by_name("hermes").make(writer()), text, [7] * 20).calls == [["add", '{"a": [1, 2']]
    whole = run(by_name("hermes").make(writer(eager=False)), text, [])
    assert (whole.calls, whole.content) == ([], text)


def test_arguments_that_are_no_json_are_content_when_not_streaming():
    text = '<tool_call>{"name": "add", "arguments": {a: 1}}</tool_call>'
    assert run(by_name("hermes").make(writer(eager=False)), text, []).content == text


def test_names_come_before_arguments_are_complete():
    parser = by_name("hermes").make(writer())
    events = parser.push('<tool_call>{"name": "add", "arguments": {"a"')
    assert [type(e) for e in events] == [ToolStart, ToolArguments]


@pytest.mark.parametrize("eager", [True, False])
def test_without_parallel_calls_only_the_first_is_shown(eager: bool):
    call = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    seen = run(by_name("hermes").make(writer(eager=eager, limit=1)), call * 3, [5] * 30)
    assert (seen.calls, seen.content) == ([["add", "{}"]], "")


@given(cuts=CUTS, eager=st.booleans())
def test_required_calls_are_a_list(cuts: list[int], eager: bool):
    wanted = [{"name": "add", "parameters": {"a": "]"}}, {"name": "get_weather", "parameters": {"x": [{}]}}]
    seen = run(ListedCallParser(writer(eager=eager)), json.dumps(wanted), cuts)
    assert [(n, json.loads(a)) for n, a in seen.calls] == [(w["name"], w["parameters"]) for w in wanted]
    assert seen.content == ""


@given(cuts=CUTS)
def test_a_named_call_is_all_arguments(cuts: list[int]):
    assert run(NamedCallParser("add"), '{"a": 1}', cuts).calls == [["add", '{"a": 1}']]


@given(cuts=CUTS)
@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "content"),
    [
        ("<think>\nhm, <b>\n</think>\n\nYes.\n", False, "hm, <b>", "Yes.\n"),
        ("so\n\nit is\n</think>\n\nYes", True, "so\n\nit is", "Yes"),
        ("plain <think>text</think>", False, "", "plain <think>text</think>"),
        ("<think>cut off\n", False, "cut off", ""),
        ("<thi", False, "", "<thi"),
        ("</think>Yes", True, "", "Yes"),
    ],
)
def test_reasoning(cuts: list[int], text: str, inside: bool, reasoning: str, content: str):
    seen = run(ThinkParser(inside=inside, shown=True, then=None), text, cuts)
    assert (seen.reasoning, seen.content) == (reasoning, content)
    assert run(ThinkParser(inside=inside, shown=False, then=None), text, cuts).reasoning == ""


@given(cuts=CUTS)
def test_calls_are_looked_for_after_the_reasoning_only(cuts: list[int]):
    call = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    parser = ThinkParser(inside=False, shown=True, then=by_name("hermes").make(writer()))
    seen = run(parser, f"<think>{call}</think>{call}", cuts)
    assert (seen.reasoning, seen.calls, seen.content) == (call, [["add", "{}"]], "")


def test_formats_are_found_by_name_and_by_template():
    found = detect("... <tool_call> ...")
    assert found is not None
    assert found.names[0] == "hermes"
    assert detect("nothing") is None
    with pytest.raises(ConfigError, match=r"Unknown tool-call-parser 'x'; known are hermes, llama"):
        by_name("x")


def test_a_format_can_be_added():
    before = list(FORMATS)
    try:
        mine = register(ToolCallFormat(("mine",), ("<<",), lambda calls: NamedCallParser("add")))
        assert by_name("mine") is mine
        assert detect("a << b <tool_call>") is mine
    finally:
        FORMATS[:] = before
