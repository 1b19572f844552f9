"""The processor: OpenAI requests in, tokens to a worker, text back."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, ClassVar

from core.components import keys
from core.components.card import WorkerCard
from core.components.router import Router
from core.components.router_messages import Routed, RouteQuery, RouteRequest, RoutersState, RouterState
from core.components.worker import Worker
from core.graph import Preflight, Service, SettingError, client_of, depends, endpoint, on_start, on_stop, service
from core.messages import Delta, EngineRequest, RequestContext, RequestRejected, Unavailable
from core.openai.card import ModelCard
from core.openai.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from core.openai.responses import ModelList, Text, Tokens
from core.openai.settings import PipelineSettings
from core.runtime import Balance, Client, InstanceGone

if TYPE_CHECKING:
    from core.openai.pipeline import Pipeline


class ProcessorConfig(PipelineSettings, frozen=True, kw_only=True):
    """Keys of the Processor."""

    router: keys.RouterMode = "round-robin"
    """How a worker is chosen: round-robin or random, or, with a Router in the graph, by any of its policies."""
    model: keys.ModelOfWorker = ""
    """The Worker's model; tokenizer and chat template come from its folder."""
    block_size: keys.BlockSizeOfWorker = None
    """Tokens in a KV block; the Worker's."""
    kv_hit_weight: keys.HitWeight = 1.0
    """The Router's weight of the fraction of the prompt that a worker holds."""
    load_weight: keys.LoadWeight = 0.5
    """The Router's weight of a worker's load relative to the others'."""
    router_num_threads: keys.RouterThreads = 4
    """Understood for configurations of the reference; see the Router's."""
    served_model_name: keys.ServedName = ""
    """Name under which clients ask for the model, by default the Frontend's, then the Worker's."""


@service()
class Processor(Service):
    """Applies the chat template, tokenizes, has a worker generate, and turns tokens back into answers."""

    Config = ProcessorConfig
    config: ProcessorConfig
    router = depends(Router)
    worker = depends(Worker)

    SAME: ClassVar[tuple[str, ...]] = ("model", "block-size")

    def __init__(self) -> None:
        self._pipeline: Pipeline | None = None
        self._workers: Client | None = None

    @classmethod
    def preflight(cls, config: ProcessorConfig, look: Preflight) -> None:
        """Raises `SettingError` when Processor and Worker are configured for different models."""
        worker = look.settings.services.get("Worker")
        if worker is None:
            return
        for key in cls.SAME:
            own, other = look.settings.services["Processor"].setting(key), worker.setting(key)
            if own.value != other.value:
                raise SettingError(
                    f"{own.origin}: {own} is {own.value!r} and {other} is {other.value!r} ({other.origin}); "
                    "give both the same, or only one of them."
                )

    @on_start
    async def connect(self) -> None:
        """Wait for the first worker and speak for its model."""
        from core.openai.pipeline import Pipeline

        source: Any = self.router if self.router is not None else self.worker
        balance = Balance.RANDOM if self.config.router == "random" else Balance.ROUND_ROBIN
        self._workers = self.context.runtime.client(client_of(source.generate).address, balance=balance)
        self.context.report("waiting for a worker")
        first = (await self._workers.wait_for_instances())[0]
        worker = WorkerCard.decode(first.metadata)
        card = ModelCard.from_engine(
            worker.info,
            worker.capabilities,
            names=(self.config.served_model_name or worker.served_name,),
            tokenizer=worker.tokenizer,
            lora=worker.lora,
        )
        self._pipeline = Pipeline(card, self._generate, self.config, metrics=self.context.metrics)

    @endpoint("chat/completions")
    def chat(self, request: ChatRequest, context: RequestContext) -> AsyncGenerator[bytes, None]:
        """See `Pipeline.chat`."""
        return self._started.chat(request, context)

    @endpoint("completions")
    def completion(self, request: CompletionRequest, context: RequestContext) -> AsyncGenerator[bytes, None]:
        """See `Pipeline.completion`."""
        return self._started.completion(request, context)

    @endpoint()
    async def tokenize(self, request: TokenizeRequest) -> AsyncGenerator[Tokens, None]:
        """One item; see `Pipeline.tokenize`."""
        yield await self._started.tokenize(request)

    @endpoint()
    async def detokenize(self, request: DetokenizeRequest) -> AsyncGenerator[Text, None]:
        """One item; see `Pipeline.detokenize`."""
        yield await self._started.detokenize(request)

    @endpoint()
    async def models(self, request: None) -> AsyncGenerator[ModelList, None]:
        """One item: what is served."""
        yield await self._started.models()

    @endpoint()
    async def ready(self, request: None) -> AsyncGenerator[bool, None]:
        """One item when a worker can take requests. Raises `Unavailable` when none can."""
        self._check_workers()
        if self.router is not None:
            await _only(self.router.ready, None)
        yield True

    @endpoint()
    async def explain_route(self, request: RouteRequest) -> AsyncGenerator[Routed, None]:
        """One item: where a Router would send the prompt now. Raises `RequestRejected` in a graph without one."""
        router = self._require_router()
        tokens = await self._started.tokenize(request)
        query = RouteQuery(
            token_ids=tokens.tokens,
            lora=request.model if request.model in self._started.card.lora else None,
            cache_salt=request.cache_salt,
            session=request.session,
        )
        self._check_workers()
        yield await _only(router.explain, query)

    @endpoint()
    async def routing_state(self, request: None) -> AsyncGenerator[RoutersState, None]:
        """One item: what every Router knows. Raises `RequestRejected` in a graph without one."""
        state = client_of(self._require_router().state)
        found: list[RouterState] = []
        for instance in state.instances():
            with suppress(InstanceGone):  # it left meanwhile
                found.append(await _only_of(state, None, instance.id))
        yield RoutersState(found)

    @on_stop
    async def end(self) -> None:
        """End the tokenizer's threads."""
        if self._pipeline is not None:
            self._pipeline.close()

    def _generate(self, request: EngineRequest, context: RequestContext) -> AsyncGenerator[Delta, None]:
        return self._check_workers().stream(request, context)

    def _require_router(self) -> Router:
        if self.router is None:
            raise RequestRejected(
                f"{self.context.plan.name} has no Router, so there is nothing to explain: workers take requests by "
                f"{self.config.router}. Serve graphs.agg_router for routing by what workers hold.",
                code="not_found",
            )
        return self.router

    def _check_workers(self) -> Client:
        assert self._workers is not None
        if not self._workers.instances():
            raise Unavailable("No worker is live now; one that failed may be coming back, so try again in a moment.")
        return self._workers

    @property
    def _started(self) -> Pipeline:
        assert self._pipeline is not None, "the endpoints are served only after the first worker came"
        return self._pipeline


async def _only(endpoint_of_dependency: Any, request: Any) -> Any:
    """The one item of an endpoint that gives one."""
    return await _only_of(client_of(endpoint_of_dependency), request, None)


async def _only_of(client: Client, request: Any, instance: str | None) -> Any:
    context = RequestContext(request_id=uuid.uuid4().hex)
    async with aclosing(client.stream(request, context, instance)) as items:
        return await anext(items)
