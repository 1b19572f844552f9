"""The contract, held by the echo engine of the examples. `test_echo_package` runs it where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from dynamo.testing import EngineConformance

EXAMPLE = Path(__file__).parents[2] / "examples/echo-engine/echo_engine.py"

spec = importlib.util.spec_from_file_location("echo_engine", EXAMPLE)
assert spec is not None
assert spec.loader is not None
echo_engine = importlib.util.module_from_spec(spec)
spec.loader.exec_module(echo_engine)


class TestEcho(EngineConformance):
    """An engine that declares little is held to little, and to all of that."""

    engine = echo_engine.EchoEngine

    @pytest.fixture(scope="class")
    @classmethod
    def engine_config(cls, tiny_model: Path) -> dict[str, object]:
        return {"model": str(tiny_model), "max_model_len": 512}


def test_example_is_small():
    """The first plug-in that an author reads has fewer than sixty lines."""
    assert len(EXAMPLE.read_text().splitlines()) < 60
