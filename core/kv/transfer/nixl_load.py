"""Finding NIXL without importing more than it, and starting an agent that does not burn a core."""

from __future__ import annotations

import importlib
import logging
import os
import threading
from typing import Any

log = logging.getLogger(__name__)

PROGRESS_DELAY_US = 1000
"""How long the progress thread sleeps in its poll. NIXL's default of 0 burns a core; this costs 2 % of one, and wakes
at once when a descriptor is readable."""
_PACKAGES = ("nixl_cu12", "nixl_cu13", "nixl_rocm")
_constructing = threading.Lock()


def find_nixl() -> tuple[Any, str]:
    """NIXL's Python API and the name of the wheel it comes from.

    The wheels are imported past the `nixl` package, which would import torch to choose between them. Raises
    `ImportError` when none is installed.
    """
    for package in _PACKAGES:
        try:
            api = importlib.import_module(f"{package}._api")
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] not in _PACKAGES:
                raise
        else:
            if "NIXL_LOG_LEVEL" not in os.environ:
                # NIXL tells of every agent on standard output, which belongs to the program around it.
                logging.getLogger("nixl").setLevel(logging.WARNING)
            return api, package
    raise ImportError("NIXL is not installed: pip install 'dynamo-serve[nixl]'")


def quiet_agent(api: Any, name: str) -> Any:
    """An agent whose progress thread sleeps between events.

    NIXL's Python API fixes the thread's delay at 0, which polls without pause; the binding below it has the setting.
    """
    binding = api.nixlBind
    applied: list[int] = []

    class Config(binding.nixlAgentConfig):  # type: ignore[misc,name-defined]
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "pthrDelay":
                value = PROGRESS_DELAY_US
                applied.append(value)
            super().__setattr__(name, value)

    class Binding:
        nixlAgentConfig = Config  # noqa: N815 - the binding's name

        def __getattr__(self, name: str) -> Any:
            return getattr(binding, name)

    config = api.nixl_agent_config(backends=[])
    with _constructing:
        api.nixlBind = Binding()
        try:
            agent = api.nixl_agent(name, config)
        finally:
            api.nixlBind = binding
    if not applied:
        log.warning(
            "NIXL agent %s: this NIXL no longer lets the progress thread's delay be set; it may burn a core", name
        )
    return agent
