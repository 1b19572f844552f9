"""What sharing one process means for `ServiceArgs`: the environment, the GPUs, and what cannot be shared."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from core.graph.config import Settings
from core.graph.config.origin import Origin
from core.graph.errors import SettingError


class OneProcess:
    """Applies every service's `ServiceArgs` to the process that they share."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._gpus: dict[tuple[str, int], tuple[int, ...]] = {}
        self._before: dict[str, str | None] = {}

    def check(self) -> None:
        """Raises `SettingError` for what one process cannot give."""
        for name, service in self._settings.services.items():
            for key, plain_value in (("python", None), ("process", "shared")):
                setting = service.setting(f"ServiceArgs.{key}")
                if setting.value != plain_value:
                    raise SettingError(
                        f"{setting.origin}: {name}.ServiceArgs.{key} is {setting.value!r}, which needs a process of "
                        "its own, and this deployment runs in one process. Remove the setting."
                    )
        self._environment()
        self._assign_gpus()

    def enter(self) -> None:
        """Set the environment variables of all services."""
        for variable, value in self._environment().items():
            self._before[variable] = os.environ.get(variable)
            os.environ[variable] = value

    def leave(self) -> None:
        """Put the environment back. Idempotent."""
        before, self._before = self._before, {}
        for variable, value in before.items():
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value

    def gpus(self, service: str, replica: int) -> tuple[int, ...]:
        """Device indices of a replica, as the engines count them."""
        return self._gpus.get((service, replica), ())

    def _environment(self) -> Mapping[str, str]:
        found: dict[str, tuple[str, Origin]] = {}
        for service in self._settings.services.values():
            origins = {s.key.removeprefix("ServiceArgs.envs."): s.origin for s in service.values}
            for variable, value in service.args.envs.items():
                other = found.setdefault(variable, (value, origins[variable]))
                if other[0] != value:
                    raise SettingError(
                        f"{origins[variable]}: {variable} is '{value}' here and '{other[0]}' at {other[1]}, and all "
                        "services of this deployment share one process; give both the same value."
                    )
        return {variable: value for variable, (value, _) in found.items()}

    def _assign_gpus(self) -> None:
        self._gpus.clear()
        available = visible_gpus()
        taken = 0
        for name, service in self._settings.services.items():
            each = service.args.resources.gpus
            for replica in range(service.args.workers if each else 0):
                if taken + each > available:
                    setting = service.setting("ServiceArgs.resources.gpu")
                    raise SettingError(
                        f"{setting.origin}: {name} asks for {each} GPU for each of {service.args.workers} replicas, "
                        f"and this machine has {available}; set {name}.ServiceArgs.resources.gpu to 0 to run on the "
                        f"CPU, or lower {name}.ServiceArgs.workers."
                    )
                if each > 1 and taken:
                    setting = service.setting("ServiceArgs.resources.gpu")
                    raise SettingError(
                        f"{setting.origin}: {name} asks for {each} GPUs a replica, and only one replica with "
                        "several GPUs can run in one process; use one GPU a replica, or a single replica."
                    )
                self._gpus[name, replica] = tuple(range(taken, taken + each))
                taken += each


def visible_gpus() -> int:
    """NVIDIA GPUs that this process may use: `CUDA_VISIBLE_DEVICES`, else the devices that the driver lists."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([part for part in chosen.split(",") if part.strip() not in ("", "-1")])
    listed = Path("/proc/driver/nvidia/gpus")
    return len(list(listed.iterdir())) if listed.is_dir() else 0
