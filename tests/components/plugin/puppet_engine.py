"""Engines that do what a test tells them, through `engine_args` and through the prompt.

The folder this module lies in is an installed distribution as far as entry points are concerned.
"""

import asyncio
from pathlib import Path
from typing import ClassVar

import dynamo

DIE = 13
"""A prompt that begins with this token kills the engine after its first token of output."""


def count_start(file):
    """How many starts the file has seen, this one included."""
    starts = len(file.read_text()) + 1 if file.exists() else 1
    file.write_text("x" * starts)
    return starts


class PuppetEngine:
    """Says the ids of the prompt in turn.

    `engine_args`: `step`, seconds a token; `refuse`, a sentence with which the start is refused; `starts`, a file in
    which starts are counted, and `max_starts`, after which they fail; `start_seconds`, how long a start takes.
    """

    calls: ClassVar[list[str]] = []
    """Ids of the workers that generated something, in order."""

    def __init__(self):
        self.config = None
        self.dead = None
        self.stopped = asyncio.Event()
        self.open = set()

    @dynamo.hookimpl
    def describe_engine(self):
        return dynamo.EngineDescription(name="puppet", summary="Does what a test says", model_required=False)

    @dynamo.hookimpl
    async def start_engine(self, config):
        config.check_engine_args(["step", "refuse", "starts", "max_starts", "start_seconds"])
        self.config = config
        arguments = config.engine_args
        if "refuse" in arguments:
            raise dynamo.ConfigError(arguments["refuse"])
        if "starts" in arguments and count_start(Path(arguments["starts"])) > arguments.get("max_starts", 99):
            raise RuntimeError("started too often")
        await asyncio.sleep(arguments.get("start_seconds", 0))
        return dynamo.EngineInfo(
            vocab_size=8192,
            max_model_len=config.max_model_len or 4096,
            eos_token_ids=(),
            device=config.device or "cpu",
        )

    @dynamo.hookimpl
    async def decode(self, request):
        if request.token_ids[0] == DIE:
            self.dead = "the puppet's strings were cut"
        self.calls.append(self.config.worker_id)
        self.open.add(request.request_id)
        try:
            for i in range(request.stop.max_tokens):
                await asyncio.sleep(self.config.engine_args.get("step", 0))
                if self.stopped.is_set() or (self.dead and i > 0):
                    raise dynamo.EngineDead(self.dead or "the puppet was put away")
                last = i + 1 == request.stop.max_tokens
                token = request.token_ids[i % len(request.token_ids)]
                yield dynamo.Delta([token], dynamo.FinishReason.LENGTH if last else None)
        finally:
            self.open.discard(request.request_id)

    @dynamo.hookimpl
    async def abort(self, request_id):
        self.open.discard(request_id)

    @dynamo.hookimpl
    def load(self):
        return [dynamo.Load(running=len(self.open), waiting=0)]

    @dynamo.hookimpl
    async def check_health(self):
        if self.dead:
            raise dynamo.EngineDead(self.dead)

    @dynamo.hookimpl
    async def stop_engine(self):
        self.stopped.set()


class AbsentEngine(PuppetEngine):
    """An engine whose package nobody has."""

    @dynamo.hookimpl
    def describe_engine(self):
        return dynamo.EngineDescription(
            name="absent", summary="Is not there", package="no-such-package", tested=">=1", install="pip install absent"
        )


class BrokenEngine:
    """Breaks the contract."""

    @dynamo.hookimpl
    def start_engin(self):
        pass
