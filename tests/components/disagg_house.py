"""A served disaggregated graph whose engines are those of tests/prefill: every token depends on every byte of KV."""

import asyncio
import contextlib
from functools import partial

import httpx

from core.components import engine_aliases
from core.engine import EngineHost, EngineRegistry, Source
from core.graph import Deployment, RestartPolicy, State, load_plan, load_settings
from core.messages import EngineConfig, EngineRequest, Rendezvous, Role, StopConditions
from core.runtime import Address, LocalRuntime
from tests.prefill.byte_engine import ByteEngine, Fabric

QUICK = {"Worker.stop-timeout": "1", "Worker.answer-timeout": "2", "Worker.prefill-queue-timeout": "20"}

SPECIAL = range(3)
"""Tokens of the demo model that answers leave out; the engine's end of sequence is one of them."""


class DisaggHouse:
    """`async with`: serves; at the end nothing may be held by anybody."""

    def __init__(self, *overrides, kind=Rendezvous.PULL, prefill=1, decode=1, blocks=256, graph="graphs.disagg"):
        self.kind = kind
        self.fabric = Fabric()
        registry = EngineRegistry(entry_points=[])
        make = partial(ByteEngine, self.fabric, frozenset({kind}), blocks, samples_first=False)
        registry.add(make, Source("bytes", "tests"))
        plan = load_plan(graph)
        given = list((QUICK | dict(o.split("=", 1) for o in overrides)).items())
        given += [
            ("Frontend.port", "0"),
            ("Worker.ServiceArgs.workers", str(decode)),
            ("PrefillWorker.ServiceArgs.workers", str(prefill)),
            ("Worker.ServiceArgs.max-restarts", "3"),
            ("PrefillWorker.ServiceArgs.max-restarts", "3"),
        ]
        settings = load_settings(
            plan, overrides=given, shortcuts={"engine": "bytes"}, aliases=engine_aliases([]), environment={}
        )
        self.seen = []
        self.deployment = Deployment(
            plan,
            settings,
            LocalRuntime(),
            engines=registry,
            observe=self.seen.append,
            restart=RestartPolicy(first_delay=0.01),
        )
        self.drained = False
        """No HTTP server answers any more."""
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self):
        await self._stack.enter_async_context(self.deployment)
        (banner,) = self.deployment.announcements
        self.url = banner.split(" at ")[1].split("/v1")[0]
        limits = httpx.Limits(max_connections=600)
        self.http = await self._stack.enter_async_context(
            httpx.AsyncClient(base_url=self.url, timeout=60, limits=limits)
        )
        return self

    async def __aexit__(self, kind, error, traceback):
        try:
            if kind is None and not self.drained:
                await self.quiet()
                self.deployment.check_integrity()
        finally:
            await self._stack.aclose()
        if kind is None:
            left = {name: engine.sessions for name, engine in self.fabric.engines.items() if engine.sessions}
            assert left == {}, f"KV is held for nobody: {left}"

    # Engines; a restarted replica has a new one.

    @property
    def engines(self):
        """Every engine that a worker started, in order."""
        return list(self.fabric.engines.values())

    def engine(self, service, replica=0):
        """The engine of a live replica."""
        found = next(r for r in self.deployment.replicas(service) if r.index == replica)
        return self.fabric.engines[found.context.instance]

    def instances(self, service, endpoint):
        """Ids of the replicas that clients of an endpoint see."""
        client = self.deployment.runtime.client(Address("dynamo", service, endpoint))
        return [instance.id for instance in client.instances()]

    def replica(self, service, replica=0):
        return next(r for r in self.deployment.replicas(service) if r.index == replica)

    async def kill(self, service, replica=0):
        """As if the engine had died. Returns when nothing of the replica is left, and before there is another."""
        began = len(self.seen)
        self.replica(service, replica).context.fail(RuntimeError("the test ends it"))
        await self.until(
            lambda: (service, replica, State.RESTARTING) in [(e.service, e.replica, e.state) for e in self.seen[began:]]
        )

    # Talk.

    async def complete(self, prompt, max_tokens=6, headers=None, **more):
        """The answer to one completion request."""
        body = {"model": "demo", "prompt": prompt, "max_tokens": max_tokens, **more}
        return await self.http.post("/v1/completions", json=body, headers=headers)

    async def text(self, prompt, max_tokens=6, **more):
        """The generated text."""
        answer = await self.complete(prompt, max_tokens, **more)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    async def state(self):
        answer = await self.http.get("/prefill/state")
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def expected(self, prompt, max_tokens=6):
        """The text that an aggregated engine gives."""
        engine = ByteEngine(Fabric(), frozenset({self.kind}), 256, samples_first=False)
        registry = EngineRegistry([])
        adapter = registry.add(lambda: engine, Source("bytes", "tests"))
        request = EngineRequest(
            request_id="expected", token_ids=list(prompt), stop=StopConditions(max_tokens=max_tokens)
        )
        async with EngineHost(adapter, EngineConfig(model="", worker_id="lone"), Role.AGGREGATED) as host:
            tokens = [token async for delta in host.decode(request) for token in delta.token_ids]
        answer = await self.http.post(
            "/v1/detokenize", json={"model": "demo", "tokens": [t for t in tokens if t not in SPECIAL]}
        )
        return next(iter(answer.json().values()))

    # Ends.

    async def until(self, condition, seconds=10):
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110  what is waited for has no event
                await asyncio.sleep(0.005)

    async def queued(self, count, seconds=5):
        """Wait until so many tasks wait in the queue."""
        async with asyncio.timeout(seconds):
            while (await self.state())["workers"][0]["queue_depth"] != count:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def quiet(self, seconds=20):
        """Wait until nobody does or holds anything, and check that nothing is lost."""
        found = []

        def held(state):
            found[:] = [
                *(f"{w['worker']} has {w['under_way']} under way" for w in state["workers"] if w["under_way"]),
                *(f"{p['worker']} is busy" for p in state["prefill_workers"] if p["computing"] or p["holding"]),
            ]
            for one, sessions in [(w, w["rooms"]) for w in state["workers"]] + [
                (p, p["sessions"]) for p in state["prefill_workers"]
            ]:
                if sessions["live"] or sessions["freeing"]:
                    found.append(f"{one['worker']} holds {sessions}")
                busy = [load for load in one["engine"] if load["kv_blocks_used"] or load["running"]]
                found.extend(f"{one['worker']}: {load}" for load in busy)
            return bool(found)

        try:
            async with asyncio.timeout(seconds):
                while held(await self.state()):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"not quiet after {seconds} s: {found}") from None
        state = await self.state()
        for one in (*state["workers"], *state["prefill_workers"]):
            assert one["fault"] is None, one
            sessions = one.get("rooms") or one["sessions"]
            assert sessions["opened"] == sessions["imported"] + sessions["released"] + sessions["expired"], sessions
            assert not sessions["stuck"], sessions
        if state["workers"]:
            assert state["workers"][0]["queue_depth"] == 0
            queue = state["workers"][0]["queue"]
            assert (
                queue["submitted"] == queue["acknowledged"] + queue["dead"] + queue["cancelled"] or queue["cancelled"]
            )
        return state
