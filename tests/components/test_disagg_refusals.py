"""What cannot work together is refused before a request comes, in a sentence that says where and what to do."""

import asyncio
from functools import partial

import msgspec
import pytest

from core.components import engine_aliases
from core.engine import EngineRegistry, Source, hookimpl
from core.graph import Deployment, State, load_plan, load_settings
from core.kv.fingerprint import FingerprintMismatch
from core.messages import ConfigError, Rendezvous
from core.runtime import LocalRuntime
from tests.components.disagg_house import DisaggHouse
from tests.components.plugin.puppet_engine import PuppetEngine
from tests.prefill.byte_engine import ByteEngine, Fabric


class OtherEngine(ByteEngine):
    """As the engine of bytes, with a name, a fingerprint and abilities of its own."""

    def __init__(self, kind=Rendezvous.PULL, *, canonical=True, fabric=None, **fields):
        super().__init__(fabric or Fabric(), frozenset({kind}), 64, samples_first=False)
        self._canonical = canonical
        self._fields = fields

    @hookimpl
    def describe_engine(self):
        description = super().describe_engine()
        can = msgspec.structs.replace(description.capabilities, canonical_kv=self._canonical)
        return msgspec.structs.replace(description, name="other", capabilities=can)

    @hookimpl
    async def start_engine(self, config, role):
        info = await super().start_engine(config, role)
        return msgspec.structs.replace(info, kv_fingerprint={**info.kv_fingerprint, **self._fields})


def deployment(*overrides, other=OtherEngine, engine="bytes"):
    registry = EngineRegistry(entry_points=[])
    registry.add(lambda: ByteEngine(Fabric(), frozenset({Rendezvous.PULL}), 64, samples_first=False), Source("b", "t"))
    registry.add(PuppetEngine, Source("puppet", "t"))
    registry.add(other, Source("other", "t"))
    settings = load_settings(
        load_plan("graphs.disagg"),
        overrides=[("Frontend.port", "0"), *(tuple(o.split("=", 1)) for o in overrides)],
        shortcuts={"engine": engine},
        aliases=engine_aliases([]),
        environment={},
    )
    return Deployment(settings=settings, plan=load_plan("graphs.disagg"), runtime=LocalRuntime(), engines=registry)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["PrefillWorker.engine=puppet"], "Engine 'puppet' cannot be a prefill worker; it serves as aggregated"),
        (["Worker.engine=puppet", "PrefillWorker.engine=bytes"], "Engine 'puppet' cannot be a decode worker"),
        (["Worker.prefill-attempts=2", "PrefillWorker.prefill-attempts=3"],
         "Worker.prefill-attempts and PrefillWorker.prefill-attempts must be the same, and are 2 and 3"),
        (["Worker.kv-secret=aaaaaaaaaaaaaaaaaaaa", "PrefillWorker.kv-secret=bbbbbbbbbbbbbbbbbbbb"],
         "kv-secret must be the same, and are different; set it for the Worker alone"),
        (["Worker.remote-prefill=true", "Worker.enable-disaggregated-prefill=false"],
         "remote-prefill is the same as enable-disaggregated-prefill, and one is true and the other false"),
        (["Worker.kv-lease=0"], "Worker.kv-lease must be a number above 0, found 0"),
        (["Worker.prefill-queue=rabbit"], "Worker.prefill-queue must be one of local, nats"),
        (["Worker.max-prefill-queue-size=-1"], "must be a whole number of at least 0"),
        (["PrefillWorker.prefil-attempts=2"], "no key 'prefil-attempts'; did you mean prefill-attempts"),
    ],
)  # fmt: skip
async def test_configurations(overrides, sentence):
    with pytest.raises(ConfigError) as caught:
        await deployment(*overrides).start()
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "aaaaaaaa" not in str(caught.value)


async def test_a_queue_whose_client_is_not_installed(monkeypatch):
    monkeypatch.setattr("core.components.prefill_pair.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--Worker.prefill-queue: .* pip install 'dynamo-serve\[distributed\]'"):
        await deployment("Worker.prefill-queue=nats").start()


async def test_engines_that_share_no_way():
    made = deployment("PrefillWorker.engine=other", other=lambda: OtherEngine(Rendezvous.HANDSHAKE))
    with pytest.raises(ConfigError) as caught:
        await made.start()
    assert str(caught.value) == (
        "--PrefillWorker.engine: engine 'bytes' of the Worker moves KV by pull, and 'other' of the PrefillWorker by "
        "handshake; choose engines that share a way ('dynamo engines' lists them)."
    )


async def test_different_engines_of_which_one_keeps_its_kv_to_itself():
    made = deployment("PrefillWorker.engine=other", other=lambda: OtherEngine(canonical=False))
    with pytest.raises(ConfigError, match=r"'bytes' and the PrefillWorker's 'other', and other cannot exchange KV"):
        await made.start()


async def test_fingerprints_that_differ_are_refused_with_the_field_and_both_values():
    made = deployment("PrefillWorker.engine=other", other=lambda: OtherEngine(kv_heads="8", head_size="64"))
    with pytest.raises(FingerprintMismatch) as caught:
        await made.start()
    sentence = str(caught.value)
    assert "kv_heads is 'bytes' on Worker-0-" in sentence
    assert "(bytes) and '8' on PrefillWorker-0-" in sentence
    assert "head_size" in sentence
    assert made.replicas("PrefillWorker") == []


async def test_an_engine_decodes_what_another_prefilled_where_the_core_can_convert():
    house = DisaggHouse("PrefillWorker.engine=other")
    other = partial(OtherEngine, fabric=house.fabric, block_size="99", engine="other")
    house.deployment.engines.add(other, Source("other", "t"))
    async with house:
        assert await house.text([20, *range(40, 80)]) == await house.expected([20, *range(40, 80)])
        state = await house.quiet()
        assert state["workers"][0]["ways"] == {"imported": 1}
        assert [engine.describe_engine().name for engine in house.engines] == ["other", "bytes"]


async def test_prefill_workers_that_are_gone_for_good_do_not_end_the_deployment():
    async with DisaggHouse("Worker.health-interval=0.02") as house:
        keep = house.deployment
        for _ in range(4):
            await house.until(lambda: keep.replicas("PrefillWorker"))
            keep.replicas("PrefillWorker")[0].context.fail(RuntimeError("again"))
            await house.until(lambda: not keep.replicas("PrefillWorker"))
        await house.until(lambda: any(event.state is State.GIVEN_UP for event in house.seen))
        assert await house.text([20, 21, 22]) == await house.expected([20, 21, 22])
        assert (await house.state())["workers"][0]["decisions"] == {"no worker": 1}
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await keep.wait()
