"""Turns layers of configuration into each service's typed settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from core.graph.config.origin import Layer, Node, Origin, Tree, Value, from_plain, merge, plain, relabel
from core.graph.config.schema import Follows, Key, Known, Needs, Secret, convert, is_struct, keys_of
from core.graph.config.service_args import ServiceArgs
from core.graph.config.settings import ServiceSettings, Setting, Settings
from core.graph.errors import SettingError
from core.graph.nearest import nearest
from core.graph.plan import Plan
from core.graph.service import config_of, spec_of

COMMON = "Common"
SUBSCRIPTIONS = "common-configs"
ARGS = "ServiceArgs"


@dataclass(frozen=True)
class Alias:
    """A section name that stands for a service and sets keys of it: `VllmWorker` is `Worker` with engine vllm."""

    service: str
    values: Mapping[str, Any]


def resolve(
    catalogue: Mapping[str, type], layers: Sequence[Tree], aliases: Mapping[str, Alias] | None = None
) -> Settings:
    """The settings of every service in `catalogue`.

    `layers` come strongest first. Raises `SettingError`, naming the place, for everything that is unknown, given
    twice, or of a wrong type.
    """
    merged: Node | None = None
    typed: Node | None = None  # what aliases on the command line imply: below all that was typed, above every file
    for layer in layers:
        named, implied = _with_service_names(layer, catalogue, aliases or {})
        if layer.origin.layer >= Layer.SHORTCUT:
            merged, typed = merge(merged, named), merge(typed, implied)
        else:
            merged, typed = merge(merge(merge(merged, typed), named), implied), None
    merged = merge(merge(merged, typed), Tree(Origin(Layer.DEFAULT, "default"), {}))
    assert isinstance(merged, Tree)
    common = _section(merged, COMMON)
    sections = {name: _effective(name, _section(merged, name), common, cls) for name, cls in catalogue.items()}
    _check_common(common, catalogue)
    for name, cls in catalogue.items():
        _check_keys(name, sections[name], cls, catalogue)
    services = {name: _settings(name, cls, sections, catalogue) for name, cls in catalogue.items()}
    used = {key for name in catalogue for key in _subscriptions(_section(merged, name))}
    unused = tuple(
        Setting(COMMON, key, plain(node), node.origin) for key, (_, node) in common.entries.items() if key not in used
    )
    return Settings(services, unused)


def settings_for(plan: Plan, settings: Settings) -> Settings:
    """The settings of the services that a graph serves. Raises `SettingError` for what would have no effect in it."""
    for name, service in settings.services.items():
        given = [v for v in service.values if v.origin.layer > Layer.DECORATOR]
        if name not in plan.nodes and given:
            raise SettingError(
                f"{given[0].origin}: {given[0]} cannot have an effect: {plan.name} has no {name}, only "
                f"{', '.join(plan.nodes)}. Remove the setting or serve a graph with a {name}."
            )
        for value in given if name in plan.nodes else ():
            _check_needs(value, plan)
    served = {name: settings.services[name] for name in plan.nodes}
    _check_namespaces(served)
    return Settings(served, settings.unused_common)


def _with_service_names(layer: Tree, catalogue: Mapping[str, type], aliases: Mapping[str, Alias]) -> tuple[Tree, Tree]:
    """The layer with aliases replaced by the services they stand for, and what the aliases imply."""
    known = [COMMON, *catalogue, *aliases]
    entries: dict[str, tuple[str, Node]] = {}
    implied: dict[str, tuple[str, Node]] = {}
    for written, node in layer.entries.values():
        alias = aliases.get(written)
        name = alias.service if alias and alias.service in catalogue else written
        if name not in catalogue and name != COMMON:
            raise SettingError(f"{node.origin}: unknown service '{written}'; {nearest(written, known)}")
        if isinstance(node, Value) and node.data is None:
            node = Tree(node.origin, {})
        if isinstance(node, Value):
            raise SettingError(f"{node.origin}: {written} must be a mapping of keys to values, found {node.data!r}.")
        if name in entries:
            other, earlier = entries[name]
            raise SettingError(
                f"{node.origin}: sections {other} ({earlier.origin}) and {written} both configure the {name}; keep one."
            )
        entries[name] = (written, node)
        if alias:
            for key, value in alias.values.items():
                own = node.get(key)
                if own is not None and plain(own) != value:
                    raise SettingError(
                        f"{own.origin}: {written} stands for {name} with {key} {value}, and {key} is set to "
                        f"{plain(own)}; name the section {name}, or remove the key."
                    )
            implied[name] = (name, from_plain(dict(alias.values), node.origin))
    return Tree(layer.origin, {k: (k, n) for k, (_, n) in entries.items()}), Tree(layer.origin, implied)


def _effective(name: str, section: Tree, common: Tree, cls: type) -> Tree:
    """A service's own values over what it takes from `Common`, over what its decorator says."""
    copied: dict[str, tuple[str, Node]] = {}
    for key in _subscriptions(section):
        node = common.get(key)
        if node is None:
            where = section.get(SUBSCRIPTIONS)
            assert where is not None
            raise SettingError(
                f"{where.origin}: {name} takes '{key}' from Common, which does not have it; {nearest(key, common)}"
            )
        copied[key] = (key, relabel(node, Layer.COMMON, "Common, "))
    origin = Origin(Layer.DECORATOR, f"@service of {cls.__name__}")
    decorator = from_plain({ARGS: dict(spec_of(cls).arguments)}, origin)
    result = merge(merge(section.without(SUBSCRIPTIONS), Tree(section.origin, copied)), decorator)
    assert isinstance(result, Tree)
    return result


def _subscriptions(section: Tree) -> list[str]:
    node = section.get(SUBSCRIPTIONS)
    if node is None:
        return []
    keys = convert(node, list[str] | None, SUBSCRIPTIONS) or []
    return [k.replace("_", "-") for k in keys]


def _check_common(common: Tree, catalogue: Mapping[str, type]) -> None:
    known = sorted({key for cls in catalogue.values() for key in keys_of(config_of(cls))})
    for key, (written, node) in common.entries.items():
        if key not in known:
            hint = nearest(key, known, otherwise="'dynamo graph GRAPH --keys' lists those there are.")
            raise SettingError(f"{node.origin}: no service has the key '{written}' of Common; {hint}")


def _check_keys(name: str, section: Tree, cls: type, catalogue: Mapping[str, type]) -> None:
    known = keys_of(config_of(cls))
    for key, (written, node) in section.entries.items():
        if key in known or key == ARGS:
            continue
        hint = nearest(key, [*known, ARGS, SUBSCRIPTIONS], otherwise="")
        if not hint:
            owners = [n for n, c in catalogue.items() if key in keys_of(config_of(c))]
            hint = f"{' and '.join(owners)} have it." if owners else f"its keys are {', '.join(known)}."
        if "engine-args" in known:
            hint += " The engine's own arguments go under engine-args."
        raise SettingError(f"{node.origin}: {name} has no key '{written}'; {hint}")


def _settings(name: str, cls: type, sections: Mapping[str, Tree], catalogue: Mapping[str, type]) -> ServiceSettings:
    values: list[Setting] = []
    section = sections[name]
    struct = config_of(cls)
    found: dict[str, Any] = {}
    for key in keys_of(struct).values():
        node = section.get(key.name) or _followed(key, sections, catalogue, {name})
        found[key.attribute] = _value(name, key, node, values)
    args_node = section.get(ARGS) or Tree(section.origin, {})
    if isinstance(args_node, Value):
        raise SettingError(f"{args_node.origin}: {name}.{ARGS} must be a mapping, found {args_node.data!r}.")
    args = _struct(name, ARGS, ServiceArgs, args_node, values)
    return ServiceSettings(struct(**found), args, tuple(values))


def _value(name: str, key: Key, node: Node | None, values: list[Setting], prefix: str = "") -> Any:
    path = f"{prefix}{key.name}"
    secret = key.marker(Secret) is not None
    if node is None:
        values.append(Setting(name, path, key.default, Origin(Layer.DEFAULT, "default"), secret))
        return key.default
    value = convert(node, key.type, f"{name}.{path}")
    known = key.marker(Known)
    if known is not None and value not in (names := list(known.names())):
        raise SettingError(f"{node.origin}: {name}.{path}: unknown {known.what} '{value}'; {nearest(value, names)}")
    if isinstance(node, Tree):
        values.extend(Setting(name, f"{path}.{k}", v.data, v.origin, secret) for k, v in _leaves(node))
    else:
        values.append(Setting(name, path, value, node.origin, secret))
    return value


def _struct(name: str, path: str, struct: type[msgspec.Struct], node: Tree, values: list[Setting]) -> Any:
    known = keys_of(struct)
    for key, (written, child) in node.entries.items():
        if key not in known:
            raise SettingError(f"{child.origin}: {name}.{path} has no key '{written}'; {nearest(key, list(known))}")
    found: dict[str, Any] = {}
    for key_spec in known.values():
        child_node = node.get(key_spec.name)
        if is_struct(key_spec.type) and (child_node is None or isinstance(child_node, Tree)):
            inner = child_node or Tree(node.origin, {})
            found[key_spec.attribute] = _struct(name, f"{path}.{key_spec.name}", key_spec.type, inner, values)
        else:
            found[key_spec.attribute] = _value(name, key_spec, child_node, values, f"{path}.")
    return struct(**found)


def _leaves(node: Tree, prefix: str = "") -> Iterable[tuple[str, Value]]:
    for written, child in node.entries.values():
        if isinstance(child, Tree):
            yield from _leaves(child, f"{prefix}{written}.")
        else:
            yield f"{prefix}{written}", child


def _followed(key: Key, sections: Mapping[str, Tree], catalogue: Mapping[str, type], seen: set[str]) -> Node | None:
    """The value that was set for the same key of the service that this key follows, if there is one."""
    follows = key.marker(Follows)
    if follows is None or follows.service in seen or follows.service not in catalogue:
        return None
    node = sections[follows.service].get(key.name)
    if node is not None:
        return relabel(node, Layer.FOLLOWS, f"as {follows.service}.{key.name}, ")
    other = keys_of(config_of(catalogue[follows.service])).get(key.name)
    return _followed(other, sections, catalogue, seen | {follows.service}) if other else None


def _check_needs(value: Setting, plan: Plan) -> None:
    root = value.key.partition(".")[0]
    key = keys_of(config_of(plan.nodes[value.service].cls)).get(root)
    needs = key.marker(Needs) if key else None
    if needs is None or needs.service in plan.nodes or value.value in needs.unless:
        return
    raise SettingError(
        f"{value.origin}: {value} is {value.value!r}, which needs a {needs.service}, and {plan.name} has only "
        f"{', '.join(plan.nodes)}. Remove the setting or serve a graph with a {needs.service}."
    )


def _check_namespaces(services: Mapping[str, ServiceSettings]) -> None:
    first, *others = services.items()
    for name, service in others:
        if service.args.namespace != first[1].args.namespace:
            places = " and ".join(
                f"{n} is in '{s.args.namespace}' ({s.setting('ServiceArgs.namespace').origin})"
                for n, s in (first, (name, service))
            )
            raise SettingError(f"The services of a graph share one namespace: {places}; give both the same.")


def _section(merged: Tree, name: str) -> Tree:
    node = merged.get(name)
    if node is None:
        return Tree(Origin(Layer.DEFAULT, "default"), {})
    assert isinstance(node, Tree)
    return node
