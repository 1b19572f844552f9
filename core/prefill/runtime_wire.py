"""The wire over the runtime's endpoints: in one process or across many, whichever the runtime is."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import msgspec

from core.messages.context import RequestContext
from core.messages.errors import DynamoError
from core.prefill.messages import Answer, Question
from core.prefill.wire import Handler, Unreachable, Wire, WireError
from core.runtime.interface import Address, Client, InstanceGone, NoInstance, Runtime, Served

logger = logging.getLogger("dynamo.prefill")

DISCOVERY = 1.0
"""Seconds that a worker that was never heard of is given to become known."""

_encoder = msgspec.msgpack.Encoder()
_questions: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


class RuntimeWire(Wire):
    """Every address is an instance of one endpoint. The runtime stays the caller's."""

    def __init__(self, runtime: Runtime, namespace: str) -> None:
        self._runtime = runtime
        self._address = Address(namespace, "prefill", "talk")
        self._served: dict[str, Served] = {}
        self._client: Client | None = None
        self._heard: set[str] = set()

    async def serve(self, address: str, handler: Handler) -> None:
        async def answer(question: bytes, _: RequestContext) -> AsyncIterator[bytes]:
            yield _encoder.encode(await handler(_questions.decode(question)))

        self._served[address] = await self._runtime.serve(self._address, answer, instance=address)

    async def withdraw(self, address: str) -> None:
        served = self._served.pop(address, None)
        if served is not None:
            await served.close()

    async def ask(self, address: str, question: Question, timeout: float) -> Answer:  # noqa: ASYNC109
        if self._client is None:
            self._client = self._runtime.client(self._address)
        what = type(question).__name__
        try:
            async with asyncio.timeout(timeout):
                await self._discover(self._client, address)
                context = RequestContext(request_id=question.task_id)
                stream = self._client.stream(_encoder.encode(question), context, instance=address)
                async with contextlib.aclosing(stream) as items:
                    async for item in items:
                        self._heard.add(address)
                        return _answers.decode(item)
        except (NoInstance, InstanceGone) as error:
            self._heard.discard(address)
            raise Unreachable(f"no worker answers at '{address}': it has left, or died") from error
        except TimeoutError as error:
            raise WireError(f"'{address}' did not answer {what} within {timeout:g} s") from error
        except (DynamoError, msgspec.MsgspecError) as error:
            raise WireError(f"'{address}' failed to answer {what}: {error}") from error
        except Exception as error:
            logger.exception("'%s' failed to answer %s.", address, what)
            raise WireError(f"'{address}' failed to answer {what}: {error}") from error
        raise WireError(f"'{address}' gave no answer to {what}")

    async def _discover(self, client: Client, address: str) -> None:
        """News of a worker may come after its first task: wait a moment for one that was never heard of."""
        if address in self._heard or any(instance.id == address for instance in client.instances()):
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCOVERY), contextlib.aclosing(client.watch()) as events:
                async for event in events:
                    if event.live and event.instance.id == address:
                        return
