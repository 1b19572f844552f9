"""A plug-in that breaks the contract is refused at load, in a sentence naming plug-in, package and fix."""

from __future__ import annotations

from typing import Any

import pytest

from core.engine import EngineHost, InvalidAdapter, hookimpl, hookspec
from core.engine.validate import BY_ROLE, check_adapter
from core.messages import EngineDescription, Rendezvous, Role
from tests.engine.adapters import CONFIG, SOURCE, Plain, capable, described, registered


def refusal(kind: type) -> str:
    """Why the adapter is refused."""
    with pytest.raises(InvalidAdapter) as refused:
        check_adapter(kind(), SOURCE)
    text = str(refused.value)
    assert "engine plug-in 'plain' of package 'plain-package'" in text
    return text


def having(*names: str, **methods: Any) -> type:
    """`Plain` with more hooks: coroutines that do nothing, and those given."""

    async def nothing(self) -> None:
        pass

    return type("Having", (Plain,), {name: hookimpl(nothing) for name in names} | methods)


def test_least_adapter_is_valid():
    """Six hooks make an engine."""
    assert check_adapter(Plain(), SOURCE).name == "plain"


def test_misspelt_hook():
    """A marked method that is no hook is refused with the nearest one."""
    assert "'exprt_kv' is not a hook; did you mean 'export_kv'?" in refusal(having("exprt_kv"))


def test_unlike_hook():
    """A marked method that is like no hook is refused with the list of hooks."""
    assert "the hooks are describe_engine, start_engine" in refusal(having("zzz"))


def test_unmarked_hook():
    """A method named like a hook and not marked was forgotten, not meant."""

    class Unmarked(Plain):
        async def abort(self, request_id: str) -> None:
            pass

    assert "method 'abort' is named like a hook but not marked: add @hookimpl" in refusal(Unmarked)


@pytest.mark.parametrize("name", ["start_engine", "decode", "abort", "load", "stop_engine", "describe_engine"])
def test_missing_hook(name: str):
    """Each of the six hooks is needed."""
    methods = {key: value for key, value in vars(Plain).items() if key != name}
    assert f"has no hook '{name}'" in refusal(type("Lacking", (), methods))


def test_unknown_argument():
    """An argument that the contract does not have is refused with those it has."""

    class Unknown(Plain):
        @hookimpl
        async def abort(self, request) -> None:
            pass

    assert "argument 'request' that is not in the contract; it may take request_id" in refusal(Unknown)


def test_subset_of_arguments():
    """A hook may leave arguments out, so that one added later breaks nobody."""

    class Subset(Plain):
        @hookimpl
        async def start_engine(self):
            pass

        @hookimpl
        async def decode(self, request):
            yield

    check_adapter(Subset(), SOURCE)


def test_default_argument():
    """An argument with a default would never be handed its value; that is refused."""

    class Default(Plain):
        @hookimpl
        async def decode(self, request, kv=None):
            yield

    assert "gives its argument 'kv' a default" in refusal(Default)


def test_keyword_only_argument():
    """An argument by keyword only would not be passed either."""

    class Keyword(Plain):
        @hookimpl
        async def decode(self, *, request):
            yield

    assert "'request' by keyword only: remove the '*'" in refusal(Keyword)


def test_variable_arguments():
    """Catch-all arguments hide which ones a hook uses."""

    class Anything(Plain):
        @hookimpl
        async def start_engine(self, **anything):
            pass

    assert "takes **anything; name its arguments, of config, role" in refusal(Anything)


def test_no_self():
    """A method without self is told so, and not from inside the inspect module."""

    class Selfless(Plain):
        @hookimpl
        async def stop_engine():
            pass

    assert "hook 'stop_engine' has no 'self'" in refusal(Selfless)


def test_static_hook():
    """A hook that needs no instance may be static."""

    class Static(Plain):
        @staticmethod
        @hookimpl
        async def abort(request_id: str) -> None:
            pass

    check_adapter(Static(), SOURCE)


async def _coroutine(self):
    pass


async def _async_generator(self):
    yield


def _plain(self):
    pass


def _generator(self):
    yield


@pytest.mark.parametrize(
    ("name", "method", "says"),
    [
        ("decode", _coroutine, "is a coroutine; it must give an async iterator"),
        ("decode", _generator, "is a plain generator: write 'async def'"),
        ("kv_events", _coroutine, "is a coroutine; it must give an async iterator"),
        ("load", _coroutine, "must be a plain 'def', found 'async def'"),
        ("load", _generator, "is a plain generator"),
        ("describe_engine", _async_generator, "must be a plain 'def', found 'async def'"),
        ("start_engine", _plain, "must be an 'async def' without 'yield'"),
        ("stop_engine", _async_generator, "must be an 'async def' without 'yield'"),
        ("drain", _plain, "must be an 'async def' without 'yield'"),
    ],
)
def test_wrong_flavour(name: str, method: Any, says: str):
    """A hook that is a coroutine where a function belongs, or the reverse, would fail at its first call."""

    def copy(self):
        pass

    fresh = type(copy)(method.__code__, {}, name)
    assert f"hook '{name}' {says}" in refusal(having(**{name: hookimpl(fresh)}))


def test_stream_as_a_plain_function():
    """A stream may come from a plain function that returns an async iterator."""

    class Returning(Plain):
        @hookimpl
        def decode(self, request):
            return Plain.decode(self, request, None)

    check_adapter(Returning(), SOURCE)


@pytest.mark.parametrize("option", [{"wrapper": True}, {"specname": "abort"}])
def test_hook_options(option: dict[str, Any]):
    """An engine implements its hooks; it wraps and renames none."""

    class Wrapping(Plain):
        @hookimpl(**option)
        async def drain(self) -> None:
            yield

    assert f"@hookimpl({next(iter(option))}=...)" in refusal(Wrapping)


def test_properties_are_not_evaluated():
    """A property that needs a started engine disturbs neither validation nor registration."""

    class WithProperty(Plain):
        @property
        def engine(self) -> object:
            raise AssertionError("evaluated")

    EngineHost(registered(WithProperty), CONFIG, Role.AGGREGATED)


def test_hookspec_marker_is_no_implementation():
    """A method marked with hookspec instead of hookimpl counts as unmarked."""
    assert "not marked" in refusal(type("Mixed", (Plain,), {"drain": hookspec(_coroutine)}))


def test_failing_description():
    """A description that raises is reported with its error."""

    class Failing(Plain):
        @hookimpl
        def describe_engine(self) -> EngineDescription:
            import no_such_engine_package

            return no_such_engine_package.description

    assert "describe_engine() raised ModuleNotFoundError: No module named 'no_such_engine_package'" in refusal(Failing)


def test_description_of_wrong_type():
    """A description is the contract's struct, not something like it."""

    class Dictionary(Plain):
        @hookimpl
        def describe_engine(self) -> Any:
            return {"name": "plain"}

    assert "describe_engine() gave dict, expected dynamo.EngineDescription" in refusal(Dictionary)


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ({"name": "Plain"}, "engine name 'Plain' must be lower-case"),
        ({"name": "9plain"}, "beginning with a letter"),
        ({"name": ""}, "engine name ''"),
        ({"summary": ""}, "write one line"),
        ({"summary": "two\nlines"}, "write one line"),
        ({"summary": 7}, "has a wrong field: Expected `str`, got `int` - at `$.summary`"),
        ({"package": "numpy"}, "does not say how to install it"),
        ({"tested": ">=1"}, "of no package"),
        ({"package": "numpy", "install": "pip install numpy", "tested": "about 2"}, "write a version range"),
    ],
)
def test_wrong_description(about: dict[str, Any], says: str):
    """Each field of a description is checked, since listings and errors are made of them."""
    assert says in refusal(described(**about))


@pytest.mark.parametrize(
    ("capabilities", "says"),
    [
        ({"roles": frozenset()}, "serves at least one role"),
        ({"roles": frozenset({"aggregate"})}, "wrong field: Invalid enum value 'aggregate'"),
        ({"devices": ()}, "name at least one, such as 'cpu'"),
        ({"sampling": frozenset({"temprature"})}, "names 'temprature', not a sampling parameter; did you mean 'temper"),
        ({"sampling": frozenset({"zzz"})}, "not a sampling parameter; there are temperature, top_p"),
        ({"kv_events": True, "prefix_caching": True}, "declares kv_events=True but has no hook 'kv_events'"),
        ({"rendezvous": frozenset({Rendezvous.PULL})}, "declares rendezvous 'pull' but neither role"),
        ({"canonical_kv": True}, "declares canonical_kv=True but neither role"),
    ],
)
def test_wrong_capabilities(capabilities: dict[str, Any], says: str):
    """A capability that contradicts another, or has no hook, is refused."""
    assert says in refusal(capable(**capabilities))


def test_events_need_a_prefix_cache():
    """KV events without prefix caching have nothing to tell."""
    methods = {"kv_events": hookimpl(_async_generator)}
    kind = type("Events", (capable(kv_events=True),), methods)
    assert "declares kv_events=True without prefix_caching=True" in refusal(kind)


@pytest.mark.parametrize(
    ("role", "hook"), [(role, hook) for role in (Role.PREFILL, Role.DECODE) for hook in BY_ROLE[role]]
)
def test_role_without_its_hook(role: Role, hook: str):
    """A declared role needs each of its hooks."""
    others = [name for name in BY_ROLE[role] if name != hook]
    kind = type("Role", (having(*others),), {})
    kind.capabilities = capable(roles=frozenset({role}), rendezvous=frozenset({Rendezvous.PULL})).capabilities
    assert f"declares role '{role}' but has no hook '{hook}'" in refusal(kind)


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_role_without_rendezvous(role: Role):
    """A role that moves KV needs a way to move it."""
    kind = having(*BY_ROLE[role])
    kind.capabilities = capable(roles=frozenset({role})).capabilities
    assert "no rendezvous; declare one of pull, push, handshake" in refusal(kind)


@pytest.mark.parametrize("rendezvous", list(Rendezvous))
def test_every_role_and_rendezvous(rendezvous: Rendezvous):
    """All roles with any rendezvous and all hooks are valid."""
    kind = having("prefill", "export_kv", "release_kv", "reserve_kv", "import_kv", "check_health", "drain")
    kind.capabilities = capable(roles=frozenset(Role), rendezvous=frozenset({rendezvous})).capabilities
    assert check_adapter(kind(), SOURCE).capabilities.roles == frozenset(Role)
