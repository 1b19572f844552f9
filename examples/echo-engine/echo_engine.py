"""An engine without a model: it says the prompt, again and again, until `max_tokens`."""

import asyncio
from collections.abc import AsyncIterator

from tokenizers import Tokenizer

import dynamo


class EchoEngine:
    stopped = False

    @dynamo.hookimpl
    def describe_engine(self) -> dynamo.EngineDescription:
        can = dynamo.Capabilities(sampling=frozenset({"temperature", "top_k", "top_p", "min_p", "seed"}))
        return dynamo.EngineDescription(name="echo", summary="Echoes prompts", capabilities=can, model_required=False)

    @dynamo.hookimpl
    async def start_engine(self, config: dynamo.EngineConfig) -> dynamo.EngineInfo:
        config.check_engine_args(())
        size = self.vocab_size = Tokenizer.from_file(str(config.tokenizer_file())).get_vocab_size()
        self.open: set[str] = set()  # ids of the running requests; an abort takes its id out
        return dynamo.EngineInfo(vocab_size=size, max_model_len=config.max_model_len or 8192, eos_token_ids=())

    @dynamo.hookimpl
    async def decode(self, request: dynamo.EngineRequest) -> AsyncIterator[dynamo.Delta]:
        stop, begin = request.stop, request.prior_tokens
        prompt = request.token_ids[: len(request.token_ids) - begin]
        self.open.add(request.request_id)
        try:
            for i in range(begin, begin + stop.max_tokens):
                await asyncio.sleep(0)  # a real engine computes here
                if self.stopped:
                    raise dynamo.EngineDead("The echo engine has been stopped.")
                if request.request_id not in self.open:
                    yield dynamo.Delta([], dynamo.FinishReason.ABORT)
                    return
                token = prompt[i % len(prompt)]
                while token in stop.stop_token_ids and i < stop.min_tokens:
                    token = (token + 1) % self.vocab_size
                if token in stop.stop_token_ids:
                    yield dynamo.Delta([token], dynamo.FinishReason.STOP, stop_token=token)
                    return
                yield dynamo.Delta([token], dynamo.FinishReason.LENGTH if i + 1 == begin + stop.max_tokens else None)
        finally:
            self.open.discard(request.request_id)

    @dynamo.hookimpl
    async def abort(self, request_id: str) -> None:
        self.open.discard(request_id)

    @dynamo.hookimpl
    def load(self) -> list[dynamo.Load]:
        return [dynamo.Load(running=len(self.open), waiting=0)]

    @dynamo.hookimpl
    async def stop_engine(self) -> None:
        self.stopped = True
