"""Keys of the Router, and what is wrong with them before anything is started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from core.components import keys
from core.graph.config import Follows
from core.graph.config.origin import Layer
from core.graph.errors import SettingError
from core.messages import ConfigError
from core.routing.config import RouterConfig as RoutingConfig

if TYPE_CHECKING:
    from core.graph import Preflight


class RouterConfig(RoutingConfig, frozen=True, kw_only=True):
    """Keys of the Router: those of routing, and those of its place in a graph."""

    router: Annotated[str, keys.Policy, Follows("Processor")] = "kv"
    """Policy by which a worker is chosen: kv, least-loaded, power-of-two, round-robin, random, or an installed one."""
    kv_hit_weight: Annotated[float, Follows("Processor")] = 1.0
    """What a prompt that is cached whole is worth."""
    load_weight: Annotated[float, Follows("Processor")] = 0.5
    """What it costs when as much work as the request itself is ahead of it. 0 routes by hits alone."""
    min_workers: keys.Positive = 1
    """Workers that must be live before requests are taken."""
    router_num_threads: Annotated[int, Meta(ge=1), Follows("Processor")] = 4
    """Understood for configurations of the reference; a look-up takes microseconds and needs no threads."""
    model: keys.ModelOfWorker = ""
    """The Worker's model."""
    block_size: keys.BlockSizeOfWorker = None
    """Tokens in a KV block; the Worker's. What the workers' engines really use counts."""

    def routing(self) -> RoutingConfig:
        """The part that the policies read, with the policy under its own name."""
        values = {name: getattr(self, name) for name in RoutingConfig.__struct_fields__}
        values["router"] = keys.POLICY_ALIASES.get(self.router, self.router)
        return RoutingConfig(**values)


def check(config: RouterConfig, look: Preflight) -> None:
    """Raises `ConfigError` for what cannot work, with the origin of the value that is at fault."""
    own = look.settings.services["Router"]
    try:
        config.routing().check()
    except ConfigError as error:
        # Every sentence of `RoutingConfig.check` begins with the key that is at fault.
        setting = own.setting(str(error).partition(" ")[0])
        raise SettingError(f"{setting.origin}: Router.{error}") from error
    _check_agreement(look)
    worker = look.settings.services.get("Worker")
    if worker is None:
        return
    least = own.setting("min-workers")
    if config.min_workers > worker.args.workers:
        raise SettingError(
            f"{least.origin}: {least} is {config.min_workers}, and the graph starts {worker.args.workers} of the "
            "Worker, so requests would never be taken; lower it, or raise Worker.ServiceArgs.workers."
        )
    if config.routing().router == "kv":
        _check_cache(config, look)


def _check_agreement(look: Preflight) -> None:
    """The Processor's policy is the Router's when both are given, and both know the Worker's model."""
    services = look.settings.services
    own = services["Router"]
    others = [("router", "Processor"), ("model", "Worker"), ("block-size", "Worker")]
    for key, name in others:
        if name not in services:
            continue
        mine, other = own.setting(key), services[name].setting(key)
        if key == "router" and Layer.DEFAULT in (mine.origin.layer, other.origin.layer):
            continue
        if mine.value != other.value:
            raise SettingError(
                f"{mine.origin}: {mine} is {mine.value!r} and {other} is {other.value!r} ({other.origin}); "
                f"give both the same, or set it for the {name} alone."
            )


def _check_cache(config: RouterConfig, look: Preflight) -> None:
    worker = look.settings.services["Worker"]
    caching = worker.setting("enable-prefix-caching")
    if not caching.value:
        raise SettingError(
            f"{caching.origin}: {caching} is false, and the policy 'kv' routes by what the workers' prefix caches "
            "hold; set it to true, or choose --Router.router=least-loaded."
        )
    name: str = worker.setting("engine").value
    capabilities = look.engines.get(name).description.capabilities
    if not capabilities.prefix_caching:
        raise SettingError(
            f"The policy 'kv' routes by prefix caches, and engine '{name}' has none; "
            "choose --Router.router=least-loaded."
        )
    if config.router_events and not capabilities.kv_events:
        setting = look.settings.services["Router"].setting("router-events")
        raise SettingError(
            f"{setting.origin}: {setting} is true, and engine '{name}' publishes no KV events; set it to false, and "
            "the policy 'kv' remembers what it routed instead."
        )
