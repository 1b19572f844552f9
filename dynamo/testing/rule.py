"""Marks a coroutine of the kit as one rule of the contract, and says which capabilities it is about."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any

from dynamo import Capabilities

Rule = Callable[..., Coroutine[Any, Any, None]]


def rule(*needs: str) -> Callable[[Rule], Callable[..., None]]:
    """Makes a test of a coroutine, which runs on the kit's loop. Its docstring is the rule, in one sentence.

    `needs`: names of `Capabilities` ("logprobs"), or members of one that is a set ("sampling.seed"). The rule is about
    an engine that declares all of them, and not applicable to any other.
    """

    def decorate(test: Rule) -> Callable[..., None]:
        if not test.__doc__:
            raise TypeError(f"{test.__qualname__} states no rule: give it a docstring")

        @functools.wraps(test)
        def run(self: Any, **fixtures: Any) -> None:
            self.kit.run_rule(test(self, **fixtures))

        run.needs = needs  # type: ignore[attr-defined]
        return run

    return decorate


def declares(capabilities: Capabilities, need: str) -> bool:
    """Whether the capabilities include `need`, as `rule` takes it."""
    name, _, member = need.partition(".")
    value = getattr(capabilities, name)
    return member in value if member else bool(value)
