"""Checks an adapter before it is registered, so that a mistake is a sentence at load and not a surprise at night."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

from core.engine.hookspecs import PROJECT, EngineSpec
from core.messages import ConfigError, EngineDescription, Rendezvous, Role

ALWAYS = ("describe_engine", "start_engine", "decode", "abort", "load", "stop_engine")
BY_ROLE = {
    Role.AGGREGATED: (),
    Role.PREFILL: ("prefill", "export_kv", "release_kv"),
    Role.DECODE: ("reserve_kv", "import_kv", "release_kv"),
}

_SPEC = {name: fn for name, fn in vars(EngineSpec).items() if hasattr(fn, f"{PROJECT}_spec")}
_STREAMS = frozenset({"decode", "kv_events"})
_SYNC = frozenset({"describe_engine", "load"})


@dataclass(frozen=True)
class Source:
    """Where an adapter comes from: what an error has to name."""

    entry_point: str
    distribution: str

    def __str__(self) -> str:
        return f"engine plug-in '{self.entry_point}' of package '{self.distribution}'"


class InvalidAdapter(ConfigError):
    """An installed plug-in breaks the contract. The text names plug-in, package and fix."""


def check_adapter(adapter: object, source: Source) -> EngineDescription:
    """The adapter's description, if it keeps the contract as far as can be seen without starting it.

    Raises: `InvalidAdapter` with one sentence.
    """
    hooks = _check_hooks(adapter, source)
    for name in ALWAYS:
        if name not in hooks:
            raise InvalidAdapter(f"{source} has no hook '{name}', which every engine needs: add it with @hookimpl.")
    try:
        description = hooks["describe_engine"]()
    except Exception as error:
        raise InvalidAdapter(f"{source}: describe_engine() raised {type(error).__name__}: {error}.") from error
    if not isinstance(description, EngineDescription):
        raise InvalidAdapter(
            f"{source}: describe_engine() gave {type(description).__name__}, expected dynamo.EngineDescription."
        )
    _check_description(description, hooks, source)
    return description


def _check_hooks(adapter: object, source: Source) -> dict[str, Callable[..., object]]:
    hooks: dict[str, Callable[..., object]] = {}
    for name in dir(type(adapter)):
        if name.startswith("__"):
            continue
        method = getattr(adapter, name)
        if not callable(method):
            continue
        marked = hasattr(method, f"{PROJECT}_impl")
        if not marked:
            if name in _SPEC:
                raise InvalidAdapter(f"{source}: method '{name}' is named like a hook but not marked: add @hookimpl.")
            continue
        if name not in _SPEC:
            near = difflib.get_close_matches(name, _SPEC, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"the hooks are {', '.join(_SPEC)}."
            raise InvalidAdapter(f"{source}: '{name}' is not a hook; {hint}")
        _check_signature(name, method, source)
        hooks[name] = method
    return hooks


def _check_signature(name: str, method: Callable[..., object], source: Source) -> None:
    known = [p for p in inspect.signature(_SPEC[name]).parameters if p != "self"]
    for parameter in inspect.signature(method).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise InvalidAdapter(f"{source}: hook '{name}' takes *{parameter.name}; name its arguments.")
        if parameter.name not in known:
            raise InvalidAdapter(
                f"{source}: hook '{name}' has an argument '{parameter.name}' that is not in the contract; "
                f"it may take {', '.join(known) or 'none'}."
            )
    is_coroutine = inspect.iscoroutinefunction(method)
    if name in _STREAMS and is_coroutine:
        raise InvalidAdapter(
            f"{source}: hook '{name}' is a coroutine; it must give an async iterator: use 'yield', or a plain def."
        )
    if name in _SYNC and (is_coroutine or inspect.isasyncgenfunction(method)):
        raise InvalidAdapter(f"{source}: hook '{name}' must be a plain 'def', found 'async def'.")
    if name not in _STREAMS | _SYNC and not is_coroutine:
        raise InvalidAdapter(f"{source}: hook '{name}' must be an 'async def' without 'yield'.")


def _check_description(description: EngineDescription, hooks: dict[str, Callable[..., object]], source: Source) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9-]*", description.name):
        raise InvalidAdapter(
            f"{source}: engine name {description.name!r} must be lower-case letters, digits and dashes, "
            "beginning with a letter."
        )
    capabilities = description.capabilities
    if not capabilities.roles:
        raise InvalidAdapter(f"{source}: Capabilities.roles is empty; an engine serves at least one role.")
    needed = {hook: f"role '{role}'" for role in sorted(capabilities.roles) for hook in BY_ROLE[role]}
    if capabilities.kv_events:
        needed["kv_events"] = "kv_events=True"
    for hook, why in needed.items():
        if hook not in hooks:
            raise InvalidAdapter(
                f"{source} declares {why} but has no hook '{hook}': implement it or do not declare the capability."
            )
    if capabilities.roles & {Role.PREFILL, Role.DECODE} and not capabilities.rendezvous:
        kinds = ", ".join(Rendezvous)
        raise InvalidAdapter(f"{source} declares a prefill or decode role but no rendezvous; declare one of {kinds}.")
