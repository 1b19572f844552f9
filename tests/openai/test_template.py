"""Chat templates: as transformers renders them, from wherever models keep them, and without Python's own types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.messages import ConfigError, RequestRejected
from core.openai.template import ChatTemplate

MESSAGES = [{"role": "user", "content": "Hi <b> 東"}, {"role": "assistant", "content": "  yes  "}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"é": {}}}}}]

TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}\n    {% if m.role == 'user' %}\n[{{ m['content'] | trim }}]\n{% else %}\n"
    "{{ m.content.strip() + eos_token }}\n{% endif %}\n{% endfor %}",
    "{%- set ns = namespace(n=0) -%}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{% endfor %}",
    "{{ tools | tojson(indent=4) }}{{ messages[0] | tojson }}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{{ dict(a=1) | tojson }}{{ messages | length }}{% if add_generation_prompt %}GO{% endif %}{{ enable_thinking }}",
    "{% macro say(m) %}<{{ m.role }}>{% endmacro %}{{ say(messages[0]) }}{{ messages | map(attribute='role') | join }}",
]


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_equal_to_transformers(source: str, tools: list[dict[str, Any]] | None):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    wanted, _ = utils.render_jinja_template(
        [MESSAGES], chat_template=source, tools=tools, add_generation_prompt=True, enable_thinking=False, **tokens
    )
    template = ChatTemplate(source, tokens=tokens)
    assert template.render(MESSAGES, tools=tools, extra={"enable_thinking": False}) == wanted[0]


def write(folder: Path, **config: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_template_and_its_tokens_in_the_configuration(tmp_path: Path):
    write(tmp_path, chat_template="{{ bos_token }}{{ eos_token }}", bos_token={"content": "<s>"}, eos_token="</s>")
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.render(MESSAGES) == "<s></s>"


def test_named_templates(tmp_path: Path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    write(tmp_path, chat_template=named)
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert (template.render(MESSAGES), template.render(MESSAGES, tools=TOOLS)) == ("plain", "tools")


def test_files_win_over_the_configuration(tmp_path: Path):
    write(tmp_path, chat_template="config")
    (tmp_path / "chat_template.jinja").write_text("file")
    extra = tmp_path / "additional_chat_templates"
    extra.mkdir()
    (extra / "tool_use.jinja").write_text("tools")
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert (template.render(MESSAGES), template.render(MESSAGES, tools=TOOLS)) == ("file", "tools")
    (tmp_path / "mine.jinja").write_text("mine")
    mine = ChatTemplate.load(tmp_path, str(tmp_path / "mine.jinja"))
    assert mine is not None
    assert mine.render(MESSAGES) == "mine"


def test_models_without_one(tmp_path: Path):
    assert ChatTemplate.load(tmp_path) is None


def test_broken_ones_are_named(tmp_path: Path):
    write(tmp_path, chat_template="{% if %}")
    with pytest.raises(ConfigError, match="syntax error in line 1"):
        ChatTemplate.load(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        ChatTemplate.load(tmp_path, str(tmp_path / "none.jinja"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[9].role.x }}", "refused these messages"),
        ("{{ 1 / 0 }}", "refused these messages"),
        ("{{ messages + 1 }}", "refused these messages"),
        ("{{ ''.__class__.__mro__ }}", "refused these messages"),
        ("{{ messages.append(1) }}", "refused these messages"),
        ("{{ raise_exception.__globals__['json'] }}", "refused these messages"),
    ],
)
def test_refusals_and_escapes_end_in_a_sentence(source: str, sentence: str):
    with pytest.raises(RequestRejected, match=sentence):
        ChatTemplate(source).render(MESSAGES)


def test_the_date_is_at_hand():
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(MESSAGES).isdigit()
