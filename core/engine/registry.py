"""Finds engine adapters through the entry-point group `dynamo.engines` and hands out instances.

Built-in adapters come through the same door as everybody's. Looking an adapter up imports its module, never its
engine; a plug-in that breaks the contract is listed with what is wrong and does not disturb the others.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import cast

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from core.engine.validate import InvalidAdapter, Source, check_adapter
from core.messages import ConfigError, EngineDescription

GROUP = "dynamo.engines"


@dataclass(frozen=True)
class Adapter:
    """One engine that can be asked for by name."""

    description: EngineDescription
    source: Source
    create: Callable[[], object]
    """A new instance; cheap, nothing is started."""

    @property
    def version(self) -> str | None:
        """Installed version of the engine's package; None when it is absent, or when none is needed."""
        return _installed_version(self.description.package)

    @property
    def tested(self) -> bool:
        """Whether the installed version lies in the tested range. True when there is no range."""
        if not self.description.tested or self.version is None:
            return True
        try:
            version = Version(self.version)
        except InvalidVersion:
            return False
        return SpecifierSet(self.description.tested, prereleases=True).contains(version)

    @property
    def caution(self) -> str | None:
        """What to know before using the engine: its version was never tried. None when there is nothing to say."""
        if self.tested:
            return None
        about = self.description
        return (
            f"Engine '{about.name}' was tested with {about.package} {about.tested} and {self.version} is installed: "
            f"if it misbehaves, install a tested version: pip install '{about.package}{about.tested}'"
        )

    @property
    def unavailable(self) -> str | None:
        """Why the engine cannot be started here, with what to do; None when it can."""
        package = self.description.package
        if package is None or self.version is not None:
            return None
        return f"package '{package}' is not installed; install it with: {self.description.install}"


@dataclass(frozen=True)
class Broken:
    """A plug-in that was found and refused."""

    source: Source
    error: str


class EngineRegistry:
    """The adapters that are installed. Every lookup error names what there is."""

    def __init__(self, entry_points: Iterable[EntryPoint] | None = None) -> None:
        """Loads the adapters' modules; `entry_points` defaults to everything installed in the group."""
        found = importlib.metadata.entry_points(group=GROUP) if entry_points is None else entry_points
        self.adapters: dict[str, Adapter] = {}
        self.broken: list[Broken] = []
        for entry_point in sorted(set(found), key=lambda e: (e.name, e.value)):
            source = Source(entry_point.name, entry_point.dist.name if entry_point.dist else "?")
            try:
                self.add(_factory(entry_point, source), source, name=entry_point.name)
            except InvalidAdapter as error:
                self.broken.append(Broken(source, str(error)))

    def add(self, create: Callable[[], object], source: Source, *, name: str | None = None) -> Adapter:
        """Registers an adapter class (or factory), which must call itself `name` when that is given.

        Raises: `InvalidAdapter`; the registry is then unchanged.
        """
        try:
            instance = create()
        except (Exception, SystemExit) as error:
            raise InvalidAdapter(
                f"{source} could not be created: {type(error).__name__}: {error}. "
                "The constructor takes no argument and does nothing; work belongs in start_engine."
            ) from error
        description = check_adapter(instance, source)
        if name is not None and description.name != name:
            raise InvalidAdapter(
                f"{source} describes an engine named '{description.name}': give the entry point and "
                "EngineDescription.name the same name, it is what users write after --engine."
            )
        other = self.adapters.get(description.name)
        if other is not None:
            raise InvalidAdapter(
                f"{source} is named '{description.name}', which {other.source} already is: "
                "uninstall one of the two packages or rename one engine."
            )
        adapter = Adapter(description, source, create)
        self.adapters[description.name] = adapter
        return adapter

    def get(self, name: str) -> Adapter:
        """The adapter of this name. Raises `ConfigError` when it is unknown or was refused."""
        adapter = self.adapters.get(name)
        if adapter is not None:
            return adapter
        for broken in self.broken:
            if broken.source.entry_point == name:
                raise ConfigError(broken.error)
        known = sorted(self.adapters)
        near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known) or 'none'}."
        raise ConfigError(f"Unknown engine '{name}'; {hint} 'dynamo engines' lists them with what each needs.")


def _factory(entry_point: EntryPoint, source: Source) -> Callable[[], object]:
    try:
        target = entry_point.load()
    except (Exception, SystemExit) as error:
        raise InvalidAdapter(
            f"{source}: '{entry_point.value}' could not be loaded: {type(error).__name__}: {error}. "
            "The module must import without its engine."
        ) from error
    if not callable(target):
        kind = type(target).__name__
        raise InvalidAdapter(
            f"{source}: '{entry_point.value}' is a {kind} object, not a class: "
            "write 'module:Class' and leave making the instance to the core."
        )
    return cast(Callable[[], object], target)


def _installed_version(package: str | None) -> str | None:
    if package is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
