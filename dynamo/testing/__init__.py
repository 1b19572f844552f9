"""The conformance kit: the engine contract as tests that an adapter's author runs.

    from dynamo.testing import EngineConformance

    class TestMyEngine(EngineConformance):
        engine = "my-engine"
        config = {"model": "path/to/a/small/model", "dtype": "float32"}

Run it with plain `pytest`. Each test is one rule of the contract; its docstring states the rule. Rules about
capabilities that the adapter does not declare are skipped as not applicable; everything it declares has to hold.
See docs/write-an-engine.md.
"""

import pytest

_RULES = ("lifecycle", "streaming")

pytest.register_assert_rewrite(*(f"dynamo.testing.{name}" for name in (*_RULES, "run", "cache", "target", "kit")))

from dynamo.testing.lifecycle import Lifecycle  # noqa: E402 - assertions are rewritten at import
from dynamo.testing.streaming import Streaming  # noqa: E402


class EngineConformance(Streaming, Lifecycle):
    """Every rule for an engine in the aggregated role. Subclass it as `Test...`; `Conformance` has the settings."""


__all__ = ["EngineConformance"]
