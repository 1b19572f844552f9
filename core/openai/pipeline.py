"""From an OpenAI request to engine requests, and from their tokens back to an OpenAI answer."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from typing import TypeVar

import msgspec
import xxhash

from core.messages import Constraint, EngineRequest, RequestContext, RequestRejected
from core.observe import Metrics
from core.openai import sampling
from core.openai.card import ModelCard
from core.openai.choice import Choice, ChoiceWriter
from core.openai.echo import Echo
from core.openai.events import TextParser
from core.openai.generation import Answer, Generate, Job, fan_out
from core.openai.logprobs import LogprobFormat
from core.openai.parsing import ParserFactory
from core.openai.prompts import Prompt, PromptMaker
from core.openai.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
)
from core.openai.responses import ChatCompletion, Completion, Model, ModelList, Text, Tokens, Usage
from core.openai.settings import PipelineSettings
from core.openai.stops import StopMatcher
from core.openai.template import ChatTemplate
from core.openai.tokenizer import TextTokenizer
from core.openai.writers import (
    ChatChunks,
    ChatCollector,
    CompletionChunks,
    CompletionCollector,
    StreamHead,
)

W = TypeVar("W", bound=ChoiceWriter)

_MOST_CHOICES = 1024
"""Of one request, over all its prompts: each is a sequence on an engine."""

_COMPLETION_TOKENS = 16
"""OpenAI's default for completions that set no limit."""


class Pipeline:
    """One served model. Its generators raise what is wrong before their first item where that is possible.

    `generate` starts one sequence on an engine, wherever that is. Close the pipeline when it is no longer used.
    """

    def __init__(
        self,
        card: ModelCard,
        generate: Generate,
        settings: PipelineSettings | None = None,
        *,
        metrics: Metrics | None = None,
    ) -> None:
        """Loads tokenizer and chat template. Raises `ConfigError` when they are missing or broken."""
        settings = settings or PipelineSettings()
        self.card = card
        self.tokenizer = TextTokenizer(card.tokenizer, fast=settings.fast_tokenizer)
        template = ChatTemplate.load(self.tokenizer.folder, settings.chat_template)
        self._parsers = ParserFactory(card, template, settings)
        self.tokenizer.show(self._parsers.special_tokens)
        self._prompts = PromptMaker(card, self.tokenizer, template, threads=settings.tokenizer_threads)
        self._generate = generate
        self._metrics = metrics
        self._settings = settings
        self._fingerprint = "fp_" + xxhash.xxh3_64_hexdigest(
            msgspec.json.encode(msgspec.structs.replace(card, created=0))
        )

    def close(self) -> None:
        """Ends the tokenizer's threads. Idempotent."""
        self._prompts.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def check_ready(self) -> None:
        """A pipeline is ready when it has been made; whoever owns its workers knows more."""

    async def models(self) -> ModelList:
        """What is served."""
        card = self.card
        return ModelList(
            "list",
            [
                Model(name, "model", card.created, "dynamo", name if name in card.names else card.names[0],
                      card.max_model_len, card.engine)
                for name in card.served
            ],
        )  # fmt: skip

    async def tokenize(self, request: TokenizeRequest) -> Tokens:
        """Ids of a text or of a conversation's prompt."""
        self._lora(request.model)
        prompt = await self._prompts.tokenize(request)
        names = [self.tokenizer.token(i) for i in prompt.token_ids] if request.return_token_strs else None
        return Tokens(len(prompt.token_ids), self.card.max_model_len, prompt.token_ids, names)

    async def detokenize(self, request: DetokenizeRequest) -> Text:
        """The text of ids."""
        self._lora(request.model)
        if request.tokens and max(request.tokens) >= self.card.vocab_size:
            raise RequestRejected(
                f"'tokens' names token {max(request.tokens)}; this model's ids are 0 to {self.card.vocab_size - 1}.",
                param="tokens",
            )
        return Text(self.tokenizer.decode(request.tokens, skip_special_tokens=bool(request.skip_special_tokens)))

    async def chat(self, request: ChatRequest, context: RequestContext) -> AsyncGenerator[bytes, None]:
        """Streaming: server-sent events ready for the socket, the last item ending with `data: [DONE]`.
        Otherwise exactly one item, the JSON body. With `context.explain` an item comes before them: the routing
        decisions as a JSON list, empty when no Router was on the way.

        Raises `RequestRejected` and what `generate` raises.
        """
        lora = self._lora(request.model)
        _check(request)
        top = _chat_logprobs(request)
        named, required = self._parsers.check(request)
        constraint = self._parsers.constraint(request, named, required)
        prompt = await self._prompts.chat(request)
        limit = request.max_completion_tokens or request.max_tokens or self._settings.default_max_tokens
        engine_request = self._engine_request(request, context, prompt, limit, lora, constraint, top)
        format_ = self._format(request, top)
        n = request.n or 1
        answer = Answer(self._generate, context, self._metrics, choices_per_prompt=n)
        head = self._head("chat.completion.chunk", "chatcmpl", request, context)
        usage_of = _usage_so_far(request, answer)
        stops = sampling.stop_strings(request)

        def parser() -> TextParser | None:
            return self._parsers.parser(request, prompt.text, named, required, constrained=constraint is not None)

        if request.stream:
            for i, one in enumerate(fan_out(engine_request, n)):
                chunks = ChatChunks(head, i, format_, usage_of)
                answer.jobs.append(Job(self._choice(request, chunks, stops, parser(), format_, usage_of), one))
            pieces = answer.stream(head, include_usage=_include_usage(request))
            async for piece in answer.explained(pieces) if context.explain else pieces:
                yield piece
            return
        collectors = [ChatCollector(i, format_) for i in range(n)]
        for collector, one in zip(collectors, fan_out(engine_request, n), strict=True):
            answer.jobs.append(Job(self._choice(request, collector, stops, parser(), format_, None), one))
        await answer.collect()
        if context.explain:
            yield answer.decisions()
        yield msgspec.json.encode(
            ChatCompletion(
                f"chatcmpl-{context.request_id}", "chat.completion", int(time.time()), request.model, self._fingerprint,
                [c.choice() for c in collectors], answer.usage(),
            )
        )  # fmt: skip

    async def completion(self, request: CompletionRequest, context: RequestContext) -> AsyncGenerator[bytes, None]:
        """As `chat`, for plain completions."""
        lora = self._lora(request.model)
        _check(request)
        self._check_completion(request)
        constraint = sampling.constraint(request, self.card)
        prompts = await self._prompts.completions(request)
        limit = _COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
        format_ = self._format(request, request.logprobs)
        n = request.n or 1
        if len(prompts) * n > _MOST_CHOICES:
            raise RequestRejected(
                f"The request asks for {len(prompts) * n} texts; at most {_MOST_CHOICES} are made at once. "
                "Send fewer prompts.",
                param="prompt",
            )
        answer = Answer(self._generate, context, self._metrics, choices_per_prompt=n)
        head = self._head("text_completion", "cmpl", request, context)
        usage_of = _usage_so_far(request, answer)
        stops = sampling.stop_strings(request)
        collectors: list[CompletionCollector] = []
        for place, prompt in enumerate(prompts):
            one_of = self._engine_request(request, context, prompt, limit, lora, constraint, request.logprobs)
            if len(prompts) > 1:
                one_of = msgspec.structs.replace(one_of, request_id=f"{one_of.request_id}-p{place}")
            for i, one in enumerate(fan_out(one_of, n)):
                writer: CompletionChunks | CompletionCollector
                if request.stream:
                    writer = CompletionChunks(head, place * n + i, format_, usage_of)
                else:
                    writer = CompletionCollector(place * n + i, format_)
                    collectors.append(writer)
                echo = Echo(prompt, self.tokenizer, logprobs=format_ is not None) if request.echo else None
                choice = self._choice(request, writer, stops, None, format_, usage_of, echo, discard=limit == 0)
                answer.jobs.append(Job(choice, one))
        if request.stream:
            pieces = answer.stream(head, include_usage=_include_usage(request))
            async for piece in answer.explained(pieces) if context.explain else pieces:
                yield piece
            return
        await answer.collect()
        if context.explain:
            yield answer.decisions()
        yield msgspec.json.encode(
            Completion(
                f"cmpl-{context.request_id}", "text_completion", int(time.time()), request.model, self._fingerprint,
                [c.choice() for c in collectors], answer.usage(),
            )
        )  # fmt: skip

    def _lora(self, model: str | None) -> str | None:
        """The adapter that a request's `model` names, if it names one. Raises `RequestRejected` for unknown models."""
        if model is None or model in self.card.names:
            return None
        if model in self.card.lora:
            return model
        raise RequestRejected(
            f"The model {model[:200]!r} is not served here; served are {', '.join(self.card.served)}.",
            param="model",
            code="model_not_found",
        )

    def _check_completion(self, request: CompletionRequest) -> None:
        if request.suffix:
            raise RequestRejected(
                "'suffix' is not supported: the models served here continue a text, they do not fill in its middle. "
                "Leave it out.",
                param="suffix",
            )
        if request.best_of is not None and request.best_of != (request.n or 1):
            raise RequestRejected(
                f"'best_of' is {request.best_of} and 'n' is {request.n or 1}; make them equal, or leave 'best_of' out.",
                param="best_of",
            )
        if request.max_tokens == 0 and not request.echo:
            raise RequestRejected("'max_tokens' must be at least 1 unless 'echo' is set, found 0.", param="max_tokens")
        if request.echo and request.logprobs is not None and not self.card.capabilities.prompt_logprobs:
            raise RequestRejected(
                "'echo' with 'logprobs' needs the prompt's log-probabilities, which this model's engine does not give; "
                "leave out one of them.",
                param="echo",
            )

    def _engine_request(
        self,
        request: GenerationRequest,
        context: RequestContext,
        prompt: Prompt,
        limit: int | None,
        lora: str | None,
        constraint: Constraint | None,
        logprobs: int | None,
    ) -> EngineRequest:
        if logprobs is not None and not self.card.capabilities.logprobs:
            raise RequestRejected("'logprobs' is not supported by this model's engine; leave it out.", param="logprobs")
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        stop = sampling.stop_conditions(request, self.card, limit, len(prompt.token_ids), param=param)
        return EngineRequest(
            request_id=context.request_id,
            token_ids=prompt.token_ids,
            stop=stop,
            sampling=sampling.sampling_params(request, self.card, self.tokenizer),
            logprobs=logprobs,
            prompt_logprobs=logprobs if isinstance(request, CompletionRequest) and request.echo else None,
            constraint=constraint,
            lora=lora,
            cache_salt=request.cache_salt,
            priority=request.priority or 0,
        )

    def _choice(
        self,
        request: GenerationRequest,
        writer: ChoiceWriter,
        stops: tuple[str, ...],
        parser: TextParser | None,
        format_: LogprobFormat | None,
        usage_of: Callable[[int], Usage] | None,
        echo: Echo | None = None,
        *,
        discard: bool = False,
    ) -> Choice:
        include = bool(request.include_stop_str_in_output)
        return Choice(
            writer,
            self.tokenizer.detokenizer(skip_special_tokens=request.skip_special_tokens is not False),
            stops=StopMatcher(stops, include=include) if stops else None,
            parser=parser,
            logprobs=format_ is not None,
            hide_stop_token=not include,
            counted=usage_of is not None,
            echo=echo,
            discard=discard,
        )

    def _format(self, request: GenerationRequest, top: int | None) -> LogprobFormat | None:
        if top is None:
            return None
        return LogprobFormat(self.tokenizer, top, as_ids=bool(request.return_tokens_as_token_ids))

    def _head(self, kind: str, prefix: str, request: GenerationRequest, context: RequestContext) -> StreamHead:
        id_ = f"{prefix}-{context.request_id}"
        return StreamHead(
            kind, id_, int(time.time()), request.model, self._fingerprint, null_usage=_include_usage(request)
        )


def _check(request: GenerationRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise RequestRejected(
            "'stream_options' is only for streamed answers; set 'stream' to true or leave it out.",
            param="stream_options",
        )


def _chat_logprobs(request: ChatRequest) -> int | None:
    if request.top_logprobs and not request.logprobs:
        raise RequestRejected("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
    return (request.top_logprobs or 0) if request.logprobs else None


def _include_usage(request: GenerationRequest) -> bool:
    return request.stream_options is not None and bool(request.stream_options.include_usage)


def _usage_so_far(request: GenerationRequest, answer: Answer) -> Callable[[int], Usage] | None:
    options = request.stream_options
    if not request.stream or options is None or not options.continuous_usage_stats:
        return None
    return lambda _: answer.usage()
