"""The resolved configuration of a graph: typed values, and the origin of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from core.graph.config.origin import Layer, Origin
from core.graph.config.service_args import ServiceArgs
from core.graph.errors import SettingError
from core.messages import ConfigError


@dataclass(frozen=True)
class Setting:
    """One value and where it comes from."""

    service: str
    key: str
    """Dotted, with dashes: "ServiceArgs.workers"."""
    value: Any
    origin: Origin
    secret: bool = False

    def __str__(self) -> str:
        return f"{self.service}.{self.key}"


@dataclass(frozen=True)
class ServiceSettings:
    """Everything that is configured of one service."""

    config: msgspec.Struct
    """An instance of the service's `Config`."""
    args: ServiceArgs
    values: tuple[Setting, ...]

    def setting(self, key: str) -> Setting:
        """The setting of a dotted key with dashes. Raises `KeyError`."""
        for setting in self.values:
            if setting.key == key:
                return setting
        raise KeyError(key)


@dataclass(frozen=True)
class Settings:
    """The configuration of every service of a graph, by name."""

    services: Mapping[str, ServiceSettings]
    unused_common: tuple[Setting, ...] = ()
    """Keys of `Common` to which no service subscribes."""

    @property
    def namespace(self) -> str:
        """The deployment's name."""
        return next(iter(self.services.values())).args.namespace


@contextmanager
def blame(setting: Setting) -> Iterator[None]:
    """A `ConfigError` in the block begins with the place of the setting that led to it."""
    try:
        yield
    except ConfigError as error:
        if setting.origin.layer is Layer.DEFAULT:
            raise
        raise SettingError(f"{setting.origin}: {error}") from error
