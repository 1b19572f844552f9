"""Our OpenAPI document describes what the server does: schemathesis drives the server by it."""

from __future__ import annotations

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


def test_every_route_is_described():
    described = set(document()["paths"])
    assert {"/v1/chat/completions", "/v1/models/{model}", "/metrics", "/detokenize"} <= described
    for path, operations in document()["paths"].items():
        for operation in operations.values():
            assert operation["operationId"], path
            assert "200" in operation["responses"]
