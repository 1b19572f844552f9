"""Errors of graphs and their configuration."""

from __future__ import annotations

from core.messages import ConfigError


class GraphError(ConfigError):
    """The graph as written cannot be served. One sentence that names the services and what to change."""


class SettingError(ConfigError):
    """A configuration value cannot be used. One sentence that begins with where the value stands."""
