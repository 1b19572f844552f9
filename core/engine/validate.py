"""Checks an adapter before it is registered, so that a mistake is a sentence at load and not a surprise at night."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from core.engine.hookspecs import PROJECT, EngineSpec
from core.messages import ConfigError, EngineDescription, Rendezvous, Role, SamplingParams

ALWAYS = ("describe_engine", "start_engine", "decode", "abort", "load", "stop_engine")
"""Hooks of every engine."""
BY_ROLE = {
    Role.AGGREGATED: (),
    Role.PREFILL: ("prefill", "export_kv", "release_kv"),
    Role.DECODE: ("reserve_kv", "import_kv", "release_kv"),
}
"""Hooks that a declared role requires beside `ALWAYS`."""

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
        raise InvalidAdapter(
            f"{source}: describe_engine() raised {type(error).__name__}: {error}. "
            "It states constants and imports nothing of the engine."
        ) from error
    if not isinstance(description, EngineDescription):
        raise InvalidAdapter(
            f"{source}: describe_engine() gave {type(description).__name__}, expected dynamo.EngineDescription."
        )
    _check_description(description, source)
    _check_capabilities(description, hooks, source)
    return description


def _check_hooks(adapter: object, source: Source) -> dict[str, Callable[..., object]]:
    hooks: dict[str, Callable[..., object]] = {}
    for name in dir(type(adapter)):
        # Looked up statically: a property may need the started engine.
        if name.startswith("__") or not callable(_unwrapped(inspect.getattr_static(type(adapter), name))):
            continue
        method = getattr(adapter, name)
        options = getattr(method, f"{PROJECT}_impl", None)
        if options is None:
            if name in _SPEC:
                raise InvalidAdapter(f"{source}: method '{name}' is named like a hook but not marked: add @hookimpl.")
            continue
        if name not in _SPEC:
            near = difflib.get_close_matches(name, _SPEC, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"the hooks are {', '.join(_SPEC)}."
            raise InvalidAdapter(f"{source}: '{name}' is not a hook; {hint}")
        for option in ("wrapper", "hookwrapper", "specname"):
            if options.get(option):
                raise InvalidAdapter(
                    f"{source}: hook '{name}' is marked @hookimpl({option}=...); "
                    "an engine implements its hooks itself: write @hookimpl."
                )
        _check_signature(name, method, source)
        _check_flavour(name, method, source)
        hooks[name] = method
    return hooks


def _unwrapped(attribute: object) -> object:
    return attribute.__func__ if isinstance(attribute, (staticmethod, classmethod)) else attribute


def _check_signature(name: str, method: Callable[..., object], source: Source) -> None:
    known = [p for p in inspect.signature(_SPEC[name]).parameters if p != "self"]
    allowed = ", ".join(known) or "none"
    try:
        parameters = inspect.signature(method).parameters.values()
    except ValueError as error:
        raise InvalidAdapter(f"{source}: hook '{name}' has no 'self'; it is a method: add it.") from error
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise InvalidAdapter(f"{source}: hook '{name}' takes {parameter}; name its arguments, of {allowed}.")
        if parameter.name not in known:
            raise InvalidAdapter(
                f"{source}: hook '{name}' has an argument '{parameter.name}' that is not in the contract; "
                f"it may take {allowed}."
            )
        if parameter.default is not parameter.empty:
            raise InvalidAdapter(
                f"{source}: hook '{name}' gives its argument '{parameter.name}' a default, and would never be handed "
                "the value: remove the default."
            )
        if parameter.kind is parameter.KEYWORD_ONLY:
            raise InvalidAdapter(
                f"{source}: hook '{name}' takes '{parameter.name}' by keyword only: remove the '*' before it."
            )


def _check_flavour(name: str, method: Callable[..., object], source: Source) -> None:
    is_coroutine = inspect.iscoroutinefunction(method)
    if inspect.isgeneratorfunction(method):
        raise InvalidAdapter(f"{source}: hook '{name}' is a plain generator: write 'async def'.")
    if name in _STREAMS and is_coroutine:
        raise InvalidAdapter(
            f"{source}: hook '{name}' is a coroutine; it must give an async iterator: use 'yield', or a plain def."
        )
    if name in _SYNC and (is_coroutine or inspect.isasyncgenfunction(method)):
        raise InvalidAdapter(f"{source}: hook '{name}' must be a plain 'def', found 'async def'.")
    if name not in _STREAMS | _SYNC and not is_coroutine:
        raise InvalidAdapter(f"{source}: hook '{name}' must be an 'async def' without 'yield'.")


def _check_description(description: EngineDescription, source: Source) -> None:
    try:
        msgspec.convert(msgspec.to_builtins(description), EngineDescription)
    except (msgspec.ValidationError, TypeError) as error:
        raise InvalidAdapter(f"{source}: EngineDescription has a wrong field: {error}.") from error
    if not re.fullmatch(r"[a-z][a-z0-9-]*", description.name):
        raise InvalidAdapter(
            f"{source}: engine name {description.name!r} must be lower-case letters, digits and dashes, "
            "beginning with a letter."
        )
    if not description.summary or "\n" in description.summary:
        raise InvalidAdapter(f"{source}: EngineDescription.summary is {description.summary!r}; write one line.")
    if description.package is not None and not description.install:
        raise InvalidAdapter(
            f"{source} needs package '{description.package}' and does not say how to install it: "
            "set EngineDescription.install to the command."
        )
    if description.tested and description.package is None:
        raise InvalidAdapter(
            f"{source} states tested versions '{description.tested}' of no package: set EngineDescription.package."
        )
    try:
        SpecifierSet(description.tested)
    except InvalidSpecifier as error:
        raise InvalidAdapter(
            f"{source}: EngineDescription.tested is '{description.tested}'; "
            "write a version range such as '>=0.31,<0.34'."
        ) from error


def _check_capabilities(
    description: EngineDescription, hooks: dict[str, Callable[..., object]], source: Source
) -> None:
    can = description.capabilities
    if not can.roles:
        raise InvalidAdapter(f"{source}: Capabilities.roles is empty; an engine serves at least one role.")
    if not can.devices:
        raise InvalidAdapter(f"{source}: Capabilities.devices is empty; name at least one, such as 'cpu'.")
    for field in sorted(can.sampling - set(SamplingParams.__struct_fields__)):
        near = difflib.get_close_matches(field, SamplingParams.__struct_fields__, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(SamplingParams.__struct_fields__)}."
        raise InvalidAdapter(f"{source}: Capabilities.sampling names '{field}', not a sampling parameter; {hint}")
    needed = {hook: f"role '{role}'" for role in sorted(can.roles) for hook in BY_ROLE[role]}
    if can.kv_events:
        needed["kv_events"] = "kv_events=True"
    for hook, why in needed.items():
        if hook not in hooks:
            raise InvalidAdapter(
                f"{source} declares {why} but has no hook '{hook}': implement it or do not declare the capability."
            )
    transfers = bool(can.roles & {Role.PREFILL, Role.DECODE})
    if transfers and not can.rendezvous:
        kinds = ", ".join(Rendezvous)
        raise InvalidAdapter(f"{source} declares a prefill or decode role but no rendezvous; declare one of {kinds}.")
    if not transfers and (can.rendezvous or can.canonical_kv):
        what = f"rendezvous '{min(can.rendezvous)}'" if can.rendezvous else "canonical_kv=True"
        raise InvalidAdapter(
            f"{source} declares {what} but neither role 'prefill' nor 'decode': declare the roles or leave it out."
        )
    if can.kv_events and not can.prefix_caching:
        raise InvalidAdapter(
            f"{source} declares kv_events=True without prefix_caching=True: events tell what can be reused."
        )
