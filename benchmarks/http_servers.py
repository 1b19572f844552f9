"""The two servers that `http_overhead.py` compares. Each prints its port and serves until it is ended.

`bare`: the least that a Python server can do for a streamed chat: a route, a decode, a tokenizer, one write a token.
`library`: `core.openai` with an engine that gives the prompt's tokens back, one a delta and a turn of the loop.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import socket
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec
import uvicorn
import uvloop
from fastapi import FastAPI, Request, Response
from starlette.types import Receive, Scope, Send
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from core.messages import Delta, EngineRequest, FinishReason, RequestContext
from core.observe import Metrics
from core.openai.app import create_app
from core.openai.card import ModelCard
from core.openai.pipeline import Pipeline
from core.openai.server import HttpServer
from core.openai.settings import HttpSettings, PipelineSettings


class _Message(msgspec.Struct):
    role: str
    content: str


class _Chat(msgspec.Struct):
    model: str
    messages: list[_Message]
    max_tokens: int


def bare(tokenizer: Path, *, fast: bool) -> FastAPI:
    """The bare path."""
    file = tokenizer / "tokenizer.json"
    hf = Tokenizer.from_file(str(file))
    encoder = (
        importlib.import_module("fastokens").Tokenizer.from_file(str(tokenizer / "tokenizer.json")) if fast else hf
    )
    decode = msgspec.json.Decoder(_Chat).decode
    encode = msgspec.json.encode
    start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
    head = b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,'
    open_, close = head + b'"delta":{"content":', b'},"finish_reason":null}]}\n\n'
    end = head + b'"delta":{},"finish_reason":"length"}]}\n\ndata: [DONE]\n\n'

    class Stream(Response):
        def __init__(self, ids: list[int], limit: int) -> None:
            self.ids = ids
            self.limit = limit
            self.background = None

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await send(start)
            stream = DecodeStream(skip_special_tokens=True)
            for i in range(self.limit):
                text = stream.step(hf, self.ids[i % len(self.ids)])
                if text:
                    await send({"type": "http.response.body", "body": open_ + encode(text) + close, "more_body": True})
                await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": end, "more_body": False})

    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = decode(await request.body())
        text = f"<|im_start|>user\n{body.messages[-1].content}<|im_end|>\n<|im_start|>assistant\n"
        return Stream(encoder.encode(text).ids, body.max_tokens)

    return app


async def repeat(request: EngineRequest, context: RequestContext) -> AsyncGenerator[Delta, None]:
    """An engine that says the prompt again, one token a delta."""
    ids, limit = request.token_ids, request.stop.max_tokens
    yield Delta([ids[0]], cached_tokens=0, finish=FinishReason.LENGTH if limit == 1 else None)
    for i in range(1, limit):
        await asyncio.sleep(0)
        yield Delta([ids[i % len(ids)]], FinishReason.LENGTH if i == limit - 1 else None)


async def serve_library(tokenizer: Path, *, fast: bool, access_log: bool) -> None:
    """`core.openai` over `repeat`."""
    hf = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    vocabulary = hf.get_vocab_size()
    card = ModelCard(names=("m",), tokenizer=str(tokenizer), max_model_len=100_000, vocab_size=vocabulary)
    metrics = Metrics()
    settings = HttpSettings(port=0, access_log=access_log)
    with Pipeline(card, repeat, PipelineSettings(fast_tokenizer=fast), metrics=metrics) as pipeline:
        async with HttpServer(create_app(pipeline, settings, metrics=metrics), settings) as server:
            print(server.port, flush=True)
            await server.closed()


class _Announcing(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.servers[0].sockets[0].getsockname()[1], flush=True)


async def serve_bare(app: FastAPI) -> None:
    """uvicorn as it is, with the access log off."""
    await _Announcing(uvicorn.Config(app, port=0, access_log=False, log_level="warning", lifespan="off")).serve()


def main() -> None:
    """Serves one of the two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=["bare", "library"])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--fast", action="store_true", help="encode with fastokens")
    parser.add_argument("--access-log", action="store_true")
    arguments = parser.parse_args()
    if arguments.access_log:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.which == "bare":
        uvloop.run(serve_bare(bare(arguments.tokenizer, fast=arguments.fast)))
    else:
        uvloop.run(serve_library(arguments.tokenizer, fast=arguments.fast, access_log=arguments.access_log))


if __name__ == "__main__":
    main()
