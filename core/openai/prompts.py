"""From messages, or whatever a prompt may be, to token ids. Long ones are worked on in threads."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import msgspec

from core.messages import RequestRejected
from core.openai.card import ModelCard
from core.openai.protocol import ChatMessage, ChatRequest, CompletionRequest, MessageToolCall, TokenizeRequest, Tool
from core.openai.template import ChatTemplate
from core.openai.tokenizer import TextTokenizer

T = TypeVar("T")

_EACH = 64
"""Characters that cost as much as encoding a text costs at least."""


class Prompt(NamedTuple):
    """What the model reads."""

    token_ids: list[int]
    text: str | None
    """None where the client sent token ids."""


class PromptMaker:
    """Renders and encodes. Short prompts at once, long ones in a thread, so that they never delay the short ones."""

    def __init__(
        self, card: ModelCard, tokenizer: TextTokenizer, template: ChatTemplate | None, *, threads: int
    ) -> None:
        self._card = card
        self._tokenizer = tokenizer
        self._template = template
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenizer")

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def chat(self, request: ChatRequest) -> Prompt:
        """The prompt of a conversation. Raises `RequestRejected` for what cannot be read."""
        generate = request.add_generation_prompt
        if request.continue_final_message:
            if generate:
                raise RequestRejected(
                    "'continue_final_message' and 'add_generation_prompt' exclude each other; keep one.",
                    param="continue_final_message",
                )
            if request.messages[-1].role != "assistant":
                raise RequestRejected(
                    "'continue_final_message' continues the assistant's message, but the last one is the "
                    f"{request.messages[-1].role}'s.",
                    param="continue_final_message",
                )
            generate = False
        tools = None if request.tool_choice == "none" else request.tools
        return await self._messages(
            request.messages,
            tools,
            generation_prompt=True if generate is None else generate,
            extra=request.chat_template_kwargs,
            cut_at_end=bool(request.continue_final_message),
        )

    async def completions(self, request: CompletionRequest) -> list[Prompt]:
        """The prompts of a completion, in order. Raises `RequestRejected` for an empty or a mixed list."""
        given = request.prompt
        special = request.add_special_tokens is not False
        if isinstance(given, str):
            return await self._texts([given], special)
        if not given:
            raise RequestRejected("'prompt' is an empty list; send a text or token ids.", param="prompt")
        kinds = {type(item) for item in given}
        if kinds == {int}:
            return [self._ids(given, "prompt")]
        if kinds == {str}:
            return await self._texts([str(text) for text in given], special)
        if kinds == {list}:
            return [self._ids(ids, f"prompt[{i}]") for i, ids in enumerate(given) if isinstance(ids, list)]
        raise RequestRejected(
            "'prompt' mixes texts, token ids and lists; send a text, a list of texts, a list of token ids or a list "
            "of such lists.",
            param="prompt",
        )

    async def tokenize(self, request: TokenizeRequest) -> Prompt:
        """The ids that `request` asks for."""
        if (request.prompt is None) == (request.messages is None):
            raise RequestRejected("Send either 'prompt' or 'messages'.", param="prompt")
        if request.messages is None:
            special = request.add_special_tokens is not False
            return (await self._texts([request.prompt or ""], special, empty_ok=True))[0]
        return await self._messages(
            request.messages,
            request.tools,
            generation_prompt=request.add_generation_prompt is not False,
            extra=request.chat_template_kwargs,
        )

    async def _texts(self, texts: list[str], special: bool, *, empty_ok: bool = False) -> list[Prompt]:
        def make() -> list[Prompt]:
            return [Prompt(self._tokenizer.encode(text, add_special_tokens=special), text) for text in texts]

        prompts = await self._run(sum(map(len, texts)) + _EACH * len(texts), make)
        if not (empty_ok or all(prompt.token_ids for prompt in prompts)):
            raise RequestRejected("'prompt' is empty; send at least one token.", param="prompt")
        return prompts

    def _ids(self, ids: Sequence[Any], param: str) -> Prompt:
        if not ids:
            raise RequestRejected(f"'{param}' is empty; send at least one token id.", param="prompt")
        if (worst := max(ids)) >= self._card.vocab_size:
            raise RequestRejected(
                f"'{param}' names token {worst}; this model's ids are 0 to {self._card.vocab_size - 1}.", param="prompt"
            )
        return Prompt(list(ids), None)

    async def _messages(
        self,
        messages: list[ChatMessage],
        tools: list[Tool] | None,
        *,
        generation_prompt: bool,
        extra: dict[str, Any] | None,
        cut_at_end: bool = False,
    ) -> Prompt:
        template = self._template
        if template is None:
            raise RequestRejected(
                "This model has no chat template; use /v1/completions, or serve it with a chat template.",
                param="messages",
                code="no_chat_template",
            )
        plain = [_for_template(i, message) for i, message in enumerate(messages)]
        functions = [_tool(tool) for tool in tools] if tools else None

        def make() -> Prompt:
            text = template.render(plain, tools=functions, add_generation_prompt=generation_prompt, extra=extra)
            if cut_at_end:
                text = _cut_after(text, plain[-1]["content"])
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            if not ids:
                raise RequestRejected("The messages make an empty prompt; send some text.", param="messages")
            return Prompt(ids, text)

        return await self._run(sum(len(m["content"] or "") for m in plain), make)

    async def _run(self, size: int, work: Callable[[], T]) -> T:
        if size <= self._tokenizer.inline_chars:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def _for_template(index: int, message: ChatMessage) -> dict[str, Any]:
    """A message as templates expect it: content as one text, arguments of earlier calls as objects."""
    content = message.content
    if not (isinstance(content, str) or content is None):
        content = _joined(index, message)
    result: dict[str, Any] = {"role": message.role, "content": content}
    if message.role == "tool" and message.tool_call_id is None:
        raise RequestRejected(
            f"'messages[{index}].tool_call_id' is missing; a tool's answer names the call it belongs to.",
            param=f"messages[{index}].tool_call_id",
        )
    if content is None:
        if message.role != "assistant":
            raise RequestRejected(
                f"'messages[{index}].content' is missing; only the assistant's messages may be without.",
                param=f"messages[{index}].content",
            )
        result["content"] = ""
    if message.tool_calls:
        result["tool_calls"] = [_call(call) for call in message.tool_calls]
    if message.name is not None:
        result["name"] = message.name
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    if message.reasoning_content is not None:
        result["reasoning_content"] = message.reasoning_content
    return result


def _joined(index: int, message: ChatMessage) -> str:
    assert isinstance(message.content, list)
    texts = []
    for place, part in enumerate(message.content):
        param = f"messages[{index}].content[{place}]"
        text = part.text if part.type in ("text", "input_text", "output_text") else None
        if part.type == "refusal":
            text = part.refusal
        elif text is None and part.type in ("text", "input_text", "output_text"):
            raise RequestRejected(f"'{param}.text' is missing; a text part needs its text.", param=f"{param}.text")
        if text is None:
            raise RequestRejected(
                f"'{param}' is of type {part.type[:40]!r}; this model reads text only, send parts of type 'text'.",
                param=f"{param}.type",
                code="unsupported_content",
            )
        texts.append(text)
    return "\n".join(texts)


def _call(call: MessageToolCall) -> dict[str, Any]:
    arguments: Any = call.function.arguments
    # A model's malformed call is handed back as it was, so that the conversation can go on.
    with contextlib.suppress(msgspec.DecodeError, RecursionError):
        arguments = msgspec.json.decode(arguments)
    result: dict[str, Any] = {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
    if call.id is not None:
        result["id"] = call.id
    return result


def _tool(tool: Tool) -> dict[str, Any]:
    """A tool as the client wrote it; absent fields would otherwise read `null` in the prompt."""
    function = {
        "name": tool.function.name,
        "description": tool.function.description,
        "parameters": tool.function.parameters,
        "strict": tool.function.strict,
    }
    return {"type": tool.type, "function": {k: v for k, v in function.items() if v is not None}}


def _cut_after(text: str, content: str) -> str:
    """Everything up to the end of the last message, which is to be continued."""
    place = text.rfind(content.strip())
    if place < 0:
        raise RequestRejected(
            "The chat template changes the last message, so that it cannot be continued; leave out "
            "'continue_final_message'.",
            param="continue_final_message",
        )
    return text[: place + len(content.strip())]
