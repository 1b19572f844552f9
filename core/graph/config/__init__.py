"""Configuration: layers of values with their origins, resolved into each service's typed settings."""

from core.graph.config.origin import Layer, Origin, Tree
from core.graph.config.overrides import override_tree, split_arguments
from core.graph.config.resolve import Alias, resolve, settings_for
from core.graph.config.schema import Follows, Known, Needs, Secret
from core.graph.config.service_args import Resources, ServiceArgs
from core.graph.config.settings import ServiceSettings, Setting, Settings
from core.graph.config.yaml_source import load_file, load_text

__all__ = [
    "Alias",
    "Follows",
    "Known",
    "Layer",
    "Needs",
    "Origin",
    "Resources",
    "Secret",
    "ServiceArgs",
    "ServiceSettings",
    "Setting",
    "Settings",
    "Tree",
    "load_file",
    "load_text",
    "override_tree",
    "resolve",
    "settings_for",
    "split_arguments",
]
