from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from scripted import ScriptedEngine, make_card, make_tokenizer

from core.observe import Metrics
from core.openai.app import create_app
from core.openai.card import ModelCard
from core.openai.pipeline import Pipeline
from core.openai.settings import HttpSettings, PipelineSettings
from core.openai.tokenizer import TextTokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> TextTokenizer:
    return TextTokenizer(folder, fast=False)


@pytest.fixture
def engine(tokenizer: TextTokenizer) -> ScriptedEngine:
    return ScriptedEngine(tokenizer)


@pytest.fixture
def card(folder: Path) -> ModelCard:
    return make_card(folder)


@pytest.fixture
def make_pipeline(engine: ScriptedEngine, card: ModelCard) -> Iterator[Callable[..., Pipeline]]:
    with ExitStack() as stack:

        def make(card: ModelCard = card, metrics: Metrics | None = None, **settings: object) -> Pipeline:
            pipeline = Pipeline(card, engine.generate, PipelineSettings(**settings), metrics=metrics)  # type: ignore[arg-type]
            return stack.enter_context(pipeline)

        yield make


@pytest.fixture
def pipeline(make_pipeline: Callable[..., Pipeline]) -> Pipeline:
    return make_pipeline()


@pytest.fixture
def make_client() -> Callable[..., httpx.AsyncClient]:
    """An HTTP client whose requests go straight into the application."""

    def make(pipeline: Pipeline, metrics: Metrics | None = None, **settings: object) -> httpx.AsyncClient:
        app = create_app(pipeline, HttpSettings(**settings), metrics=metrics)  # type: ignore[arg-type]
        return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=True), base_url="http://test")

    return make


@pytest.fixture
def client(pipeline: Pipeline, make_client: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    return make_client(pipeline)
