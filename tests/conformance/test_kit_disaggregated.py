"""The disaggregated half of the kit: an engine that breaks a rule of it is found, and a sentence says how."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from dynamo import Rendezvous
from dynamo.testing import EngineConformance
from dynamo.testing.kit import Kit
from tests.conformance.kv_faults import FAULTS, LastPosition


def run_rule(engine: type, rule: str, arguments: dict[str, Any], model: Path) -> None:
    """Runs one rule on an engine of its own class."""
    config = {"model": str(model), "dtype": "float32", "device": "cpu", "max_model_len": 512, "block_size": 16}
    config |= {"kv_transfer": "memory"}
    settings = {"engine": engine, "step_timeout": 4.0, "test_timeout": 30.0}
    kind: type[EngineConformance] = type("Faulty", (EngineConformance,), settings)
    kit = kind.kit = Kit(kind, config)
    try:
        test = getattr(kind(), f"test_{rule}")
        fixtures: dict[str, Any] = {name: Rendezvous(value) for name, value in arguments.items()}
        names = inspect.signature(test).parameters
        fixtures |= {"target": kit.run(kit.shared())} if "target" in names else {}
        fixtures |= {"pair": kit.run(kit.pair())} if "pair" in names else {}
        test(**fixtures)
    finally:
        kit.close()


@pytest.mark.parametrize(
    ("engine", "rule", "arguments", "says"), FAULTS, ids=[f"{fault[0].__name__}-{fault[1]}" for fault in FAULTS]
)
def test_fault_is_found(engine: type, rule: str, arguments: dict[str, Any], says: str, tiny_model: Path) -> None:
    """An engine that breaks a rule fails that rule's test, and the failure says how."""
    with pytest.raises((Exception, pytest.fail.Exception), match=says):
        run_rule(engine, rule, arguments, tiny_model)


@pytest.mark.parametrize("kind", ["pull", "push"])
@pytest.mark.parametrize("rule", ["prompts_of_every_length", "seeded", "logprobs", "ending_at_once", "many_at_once"])
def test_last_position_may_be_left_to_the_decode_side(rule: str, kind: str, tiny_model: Path) -> None:
    """An engine that takes no token from the prefill side, and samples the first one itself, keeps every rule."""
    run_rule(LastPosition, rule, {"kind": kind}, tiny_model)


def test_no_rule_hides_another() -> None:
    """The kit is many classes in one: a rule whose name is taken would silently replace the other."""
    groups = [group for group in EngineConformance.__mro__ if group.__module__.startswith("dynamo.testing.")]
    names = [name for group in groups for name in vars(group) if not name.startswith("__")]
    again = sorted({name for name in names if names.count(name) > 1})
    assert not again, f"these are defined twice: {again}"
