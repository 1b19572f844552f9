"""The model's chat template: messages to prompt text, as `apply_chat_template` of transformers does it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from core.messages import ConfigError, RequestRejected
from core.openai.tokenizer import read_json

_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", *_TOKENS})


class ChatTemplate:
    """A compiled template with the special tokens of its tokenizer. Rendering is thread-safe."""

    def __init__(
        self, source: str, *, tools_source: str | None = None, tokens: Mapping[str, str] | None = None
    ) -> None:
        """`tools_source` replaces `source` for requests with tools. Raises `ConfigError` for a syntax error."""
        environment = _environment()
        try:
            self._plain = environment.from_string(source)
            self._with_tools = environment.from_string(tools_source) if tools_source else self._plain
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"The chat template has a syntax error in line {error.lineno}: {error.message}."
            ) from error
        self.source = tools_source or source
        self._tokens = dict(tokens or {})

    @classmethod
    def load(cls, folder: Path, override: str | None = None) -> ChatTemplate | None:
        """The template of a model folder, or of the file `override`; None when the model has none.

        Raises `ConfigError` for a file that is missing or broken.
        """
        config = read_json(folder / "tokenizer_config.json")
        names = {**read_json(folder / "special_tokens_map.json"), **config}
        tokens = {k: text for k in _TOKENS if (text := _token_text(names.get(k))) is not None}
        if override is not None:
            if not Path(override).is_file():
                raise ConfigError(f"The chat template '{override}' does not exist; name a Jinja file.")
            return cls(Path(override).read_text(encoding="utf-8"), tokens=tokens)
        templates = _templates(folder, config)
        if not templates:
            return None
        default = templates.get("default") or next(iter(templates.values()))
        return cls(default, tools_source=templates.get("tool_use"), tokens=tokens)

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. Raises `RequestRejected` when the template cannot take these messages."""
        if extra and (reserved := sorted(_RESERVED & extra.keys())):
            message = f"'chat_template_kwargs' may not set {', '.join(reserved)}; the request's own fields do."
            raise RequestRejected(message, param="chat_template_kwargs")
        template = self._with_tools if tools else self._plain
        variables = {**self._tokens, **(extra or {})}
        try:
            return template.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt, **variables
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise RequestRejected(
                f"The model's chat template refused these messages: {error}.",
                param="messages",
                code="chat_template_error",
            ) from error


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name. Files beside the tokenizer win over the configuration, as in transformers."""
    found: dict[str, str] = {}
    match config.get("chat_template"):
        case str() as source:
            found["default"] = source
        case list() as named:
            for entry in named:
                if not (isinstance(entry, dict) and isinstance(entry.get("template"), str)):
                    raise ConfigError(
                        f"'{folder}/tokenizer_config.json': chat_template entries need a name and a template."
                    )
                found[str(entry.get("name", "default"))] = entry["template"]
    if (file := folder / "chat_template.jinja").is_file():
        found["default"] = file.read_text(encoding="utf-8")
    elif isinstance(legacy := read_json(folder / "chat_template.json").get("chat_template"), str):
        found["default"] = legacy
    for named_file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[named_file.stem] = named_file.read_text(encoding="utf-8")
    return found


def _token_text(token: object) -> str | None:
    match token:
        case str():
            return token
        case {"content": str() as content}:
            return content
    return None


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; when serving it is its body."""

    tags = {"generation"}  # noqa: RUF012  jinja declares it as an instance variable

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Templates come with downloaded models: they are run as untrusted code, without Python's own types."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _dict,
    }
    environment.globals.update(functions)
    return environment
