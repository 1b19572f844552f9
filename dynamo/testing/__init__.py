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

_RULES = (
    "streaming",
    "sampling",
    "penalties",
    "stopping",
    "logprobs",
    "structured",
    "limits",
    "aborting",
    "loads",
    "caching",
    "pressure",
    "lifecycle",
    "handing",
    "moving",
    "failing",
)

pytest.register_assert_rewrite(
    *(f"dynamo.testing.{name}" for name in (*_RULES, "run", "cache", "target", "pair", "relay", "kit"))
)

# ruff: noqa: E402 - assertions are rewritten when a module is imported
from dynamo.testing.aborting import Aborting
from dynamo.testing.caching import Caching
from dynamo.testing.failing import Failing
from dynamo.testing.handing import Handing
from dynamo.testing.lifecycle import Lifecycle
from dynamo.testing.limits import Limits
from dynamo.testing.loads import Loads
from dynamo.testing.logprobs import Logprobs
from dynamo.testing.moving import Moving
from dynamo.testing.penalties import Penalties
from dynamo.testing.pressure import Pressure
from dynamo.testing.sampling import Sampling
from dynamo.testing.stopping import Stopping
from dynamo.testing.streaming import Streaming
from dynamo.testing.structured import Structured


class EngineConformance(
    Failing,
    Moving,
    Handing,
    Lifecycle,
    Pressure,
    Caching,
    Loads,
    Aborting,
    Limits,
    Structured,
    Logprobs,
    Stopping,
    Penalties,
    Sampling,
    Streaming,
):
    """Every rule for an engine, in every role that it declares. Subclass it as `Test...`; `Conformance` has the
    settings.
    """


__all__ = ["EngineConformance"]
