"""Our OpenAPI document describes what the server does: schemathesis drives the server by it."""

from __future__ import annotations

from html.parser import HTMLParser

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi_checks

from core.openai.app import create_app
from core.openai.openapi import document
from core.openai.pipeline import Pipeline
from core.openai.settings import HttpSettings

schema = schemathesis.openapi.from_dict(document())


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory):
    from scripted import ScriptedEngine, make_card, make_tokenizer

    from core.openai.tokenizer import TextTokenizer

    folder = make_tokenizer(tmp_path_factory.mktemp("schema"))
    engine = ScriptedEngine(TextTokenizer(folder, fast=False))
    with Pipeline(make_card(folder), engine.generate) as pipeline:
        yield create_app(pipeline, HttpSettings(access_log=False))


@schema.parametrize()
@settings(
    max_examples=60,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
def test_the_server_keeps_to_its_document(case: schemathesis.Case, app: object):
    case.call_and_validate(
        app=app,
        checks=[
            checks.not_a_server_error,
            openapi_checks.status_code_conformance,
            openapi_checks.content_type_conformance,
            openapi_checks.response_schema_conformance,
            openapi_checks.negative_data_rejection,
        ],
    )


class _References(HTMLParser):
    """Every tag's attributes by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[str]] = {}
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        for name, value in attrs:
            self.found.setdefault(name, []).append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


async def test_the_page_for_people_needs_no_network_and_has_no_dead_link(app: object):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        page = await client.get("/docs")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert (await client.get("/openapi.json")).json() == document()
    seen = _References()
    seen.feed(page.text)
    assert seen.open == []
    assert "src" not in seen.found
    assert set(seen.found["href"]) == {"openapi.json", "v1/models"} | {f"#{i}" for i in seen.found["id"]}
    assert set(seen.found["id"]) == set(document()["components"]["schemas"])
    for path in document()["paths"]:
        assert f"<code>{path}</code>" in page.text


def test_every_route_is_described():
    described = set(document()["paths"])
    assert {"/v1/chat/completions", "/v1/models/{model}", "/metrics", "/detokenize"} <= described
    for path, operations in document()["paths"].items():
        for operation in operations.values():
            assert operation["operationId"], path
            assert "200" in operation["responses"]
