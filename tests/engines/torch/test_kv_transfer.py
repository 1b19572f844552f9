"""Moving KV between torch engines: transports, overlap, room, leases and quarantine. The contract is in the kit."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from safetensors.torch import load_file, save_file

from core.kv.fingerprint import compare
from core.messages import ConfigError, EngineError, Overloaded, Rendezvous, Role
from dynamo.testing.target import Target
from engines.torch.kv_ranks import KvRanks
from tests.engines.torch.conftest import prompt_of, save_model, until
from tests.engines.torch.kv_pairs import ask, engine_of, make_target, pair_of

KINDS = pytest.mark.parametrize("kind", [Rendezvous.PULL, Rendezvous.PUSH])


async def test_same_tokens_over_every_transport(llama: Path) -> None:
    """Memory, sockets and NIXL, pulled and pushed, between engines whose blocks, order and ranks differ."""
    shapes: list[dict[str, Any]] = [
        {},
        {"block_size": 8, "engine_args": {"kv_layout": "HND", "kv_shards": 2}},
    ]
    transports = ["memory", "tcp"] + (["nixl"] if importlib.util.find_spec("nixl") else [])
    prompt = prompt_of(75, 3)
    for transport in transports:
        for shape in shapes:
            async with pair_of(llama, decode=shape, kv_transfer=transport) as pair:
                expected = (await pair.prefill.complete(ask(prompt, 12))).tokens
                for kind in pair.kinds:
                    run = await pair.hand_over(ask(prompt, 12, cache_salt=kind), kind)
                    assert run.tokens == expected, (transport, shape, kind)


async def test_blocks_are_pushed_while_the_prompt_is_computed(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The room fills chunk by chunk: most of the KV is there when the prefill returns, and nothing is sent twice."""
    sent: list[tuple[int, int]] = []
    push = KvRanks.push

    async def spy(self: KvRanks, *args: Any, first_token: int, tokens: int, **rest: Any) -> None:
        await push(self, *args, first_token=first_token, tokens=tokens, **rest)
        sent.append((first_token, tokens))

    monkeypatch.setattr(KvRanks, "push", spy)
    prompt = prompt_of(300)
    async with pair_of(llama, prefill={"max_num_batched_tokens": 32, "max_num_seqs": 4}) as pair:
        expected = (await pair.decode.complete(ask(prompt, 8))).tokens
        async with pair.handoff(ask(prompt, 8, cache_salt="pushed"), Rendezvous.PUSH) as handoff:
            await handoff.reserve()
            await handoff.prefill()
            early = list(sent)
            assert sum(tokens for _, tokens in early) >= 32, f"nothing was sent before the prefill returned: {early}"
            await handoff.export()
            await handoff.import_()
            assert (await handoff.finish()).tokens == expected
    assert [first for first, _ in sent] == [sum(tokens for _, tokens in sent[:n]) for n in range(len(sent))]
    assert sum(tokens for _, tokens in sent) == len(prompt)


@KINDS
async def test_a_prompt_is_preempted_while_it_is_computed_for_another(kind: Rendezvous, llama: Path) -> None:
    """What was pushed before the preemption need not be pushed again, and what was freed is not read."""
    prefill = {"num_kv_blocks": 34, "max_num_batched_tokens": 32, "max_num_seqs": 4, "max_model_len": 400}
    prompts = [prompt_of(200, seed) for seed in range(3)]
    async with pair_of(llama, prefill=prefill, decode={"num_kv_blocks": 128}) as pair:
        expected = [(await pair.decode.complete(ask(prompt, 6))).tokens for prompt in prompts]
        rivals = [ask(prompt_of(40, 50 + n), 60, name=f"rival {n}", priority=5) for n in range(4)]
        async with pair.prefill.background(rivals):
            requests = [ask(prompt, 6, name=f"r{n}", cache_salt=kind) for n, prompt in enumerate(prompts)]
            runs = await asyncio.gather(*(pair.hand_over(request, kind) for request in requests))
        assert [run.tokens for run in runs] == expected
        await pair.until_released()


async def test_an_imported_sequence_waits_for_a_seat(llama: Path) -> None:
    """Its first token comes at once; it goes on when a place is free, before those that came later."""
    async with pair_of(llama, decode={"max_num_seqs": 1}) as pair:
        expected = (await pair.decode.complete(ask(prompt_of(40), 8))).tokens
        async with pair.decode.background([ask(prompt_of(5, 9), 400, name="long")]):
            await pair.decode.until(lambda: pair.decode.load().running == 1, "the seat is taken")
            async with pair.handoff(ask(prompt_of(40), 8, cache_salt="x"), Rendezvous.PULL) as handoff:
                await handoff.arrive()
                async with handoff.stream() as stream:
                    first = await stream.next()
                    assert first is not None
                    assert first.token_ids == expected[:1]
                    assert pair.decode.load().waiting == 1
                    await engine_of(pair.decode).check_integrity()
                    await pair.decode.host.abort("long")
                    assert (await stream.finish()).tokens == expected


async def test_imported_sequences_are_preempted(llama: Path) -> None:
    """In a cache that overflows they give up their blocks like others, and are computed again with the same tokens."""
    decode = {"num_kv_blocks": 24, "max_model_len": 300}
    async with pair_of(llama, decode=decode) as pair:
        prompts = [prompt_of(60, seed) for seed in range(5)]
        expected = [(await pair.prefill.complete(ask(prompt, 100))).tokens for prompt in prompts]
        runs = await asyncio.gather(
            *(pair.hand_over(ask(prompt, 100, name=f"r{n}"), Rendezvous.PULL) for n, prompt in enumerate(prompts))
        )
        assert [run.tokens for run in runs] == expected
        assert engine_of(pair.decode).num_preemptions > 0


async def test_held_kv_fills_the_cache(llama: Path) -> None:
    """Requests wait for what is held, without a busy loop, and are served as soon as it is released."""
    async with pair_of(llama, prefill={"num_kv_blocks": 20, "max_model_len": 300}) as pair:
        prefill = pair.prefill
        expected = (await pair.decode.complete(ask(prompt_of(100, 5), 8))).tokens
        results = [await prefill.host.prefill(ask(prompt_of(150, n), 8, name=f"held {n}")) for n in range(2)]
        assert prefill.load().kv_blocks_used == 20
        async with prefill.background([ask(prompt_of(100, 5), 8, name="patient")]) as (patient,):
            await until(lambda: _stalled(prefill))
            assert prefill.load().waiting == 1
            steps = engine_of(prefill)._figures
            await asyncio.sleep(0.05)
            assert engine_of(prefill)._figures is steps, "the engine turns while there is nothing to do"
            await engine_of(prefill).check_integrity()
            await prefill.host.release_kv(results[0].session)
            assert (await patient).tokens == expected
        await prefill.host.release_kv(results[1].session)


async def test_no_room_is_reserved_before_those_who_wait(llama: Path) -> None:
    """While a request waits for blocks, blocks are not given to reservations, however small: it would starve."""
    async with pair_of(llama, decode={"num_kv_blocks": 20, "max_model_len": 300}) as pair:
        decode = pair.decode
        room = await decode.host.reserve_kv(ask(prompt_of(150), 8, name="room"))
        async with decode.background([ask(prompt_of(200, 5), 8, name="patient")]) as (patient,):
            await until(lambda: _stalled(decode))
            with pytest.raises(Overloaded, match="cache is full"):
                await decode.host.reserve_kv(ask(prompt_of(5), 8, name="small"))
            await decode.host.release_kv(room.session)
            await patient
        room = await decode.host.reserve_kv(ask(prompt_of(150), 8, name="room"))
        async with decode.stream(ask(prompt_of(200, 6), 8, name="impatient")) as stream:
            reading = asyncio.create_task(stream.finish())
            await until(lambda: _stalled(decode))
            await decode.host.abort("impatient")
            await reading
        await decode.host.release_kv(room.session)
        # Nobody waits any more, though nothing was computed since.
        await decode.host.release_kv((await decode.host.reserve_kv(ask(prompt_of(5), 8, name="small"))).session)


async def test_grants_end_before_the_lease(llama: Path) -> None:
    """What is still held, but not for much longer, is refused by its holder: nobody needs to have said so."""
    async with pair_of(llama, kv_lease=0.6) as pair:  # noqa: SIM117 - the pair is looked at when the handoff is over
        async with pair.handoff(ask(prompt_of(50), 8), Rendezvous.PULL) as handoff:
            await handoff.reserve()
            await handoff.prefill()
            ticket = await handoff.export()
            assert ticket.expires_in <= 0.6
            desk = engine_of(pair.prefill)._desk
            assert desk is not None
            assert handoff.result is not None
            session = handoff.result.session
            grants = desk.ranks._endpoints[0].grants
            await until(lambda: "ended" in str(_refusal(grants, session)))
            assert pair.prefill.load().kv_blocks_used == 4, "the blocks are held until the lease is over"
            with pytest.raises(EngineError, match="ended") as late:
                await handoff.read()
            assert late.value.retryable
            # Nobody releases it: the engine's own lease does.
            await pair.prefill.until_idle()
            with pytest.raises(EngineError, match="not held"):
                await pair.prefill.host.export_kv(session)


async def test_a_released_room_cannot_be_written_to(llama: Path) -> None:
    """A prefill that was told of room which is gone by then fails, and writes nowhere."""
    async with pair_of(llama) as pair:
        plain = (await pair.decode.complete(ask(prompt_of(90, 7), 8))).tokens
        async with pair.handoff(ask(prompt_of(90, 7), 8, cache_salt="gone"), Rendezvous.PUSH) as handoff:
            await handoff.reserve()
            await handoff.release_room()
            await pair.decode.until_idle()
            await handoff.prefill()
            with pytest.raises(EngineError, match="not held") as refused:
                await handoff.export()
            assert refused.value.retryable
        assert (await pair.decode.complete(ask(prompt_of(90, 7), 8))).tokens == plain


async def test_blocks_that_may_still_be_written_are_not_reused(llama: Path) -> None:
    """Released room stays out of use for as long as a transfer could write to it; cached blocks beside it do not."""
    async with pair_of(llama) as pair:
        decode = pair.decode
        await decode.complete(ask(prompt_of(40), 2))
        request = ask([*prompt_of(40)[:32], *prompt_of(40, 8)], 8)
        room = await decode.host.reserve_kv(request)
        assert room.cached_tokens == 32
        desk = engine_of(decode)._desk
        assert desk is not None
        fresh = desk._rooms[room.session].fresh
        with desk.ranks.claimed(fresh):
            await decode.host.release_kv(room.session)
            await decode.until(lambda: decode.load().kv_blocks_used == len(fresh), "cached blocks are free at once")
            await decode.complete(ask(prompt_of(300, 2), 8))
            assert decode.load().kv_blocks_used >= len(fresh)
            await engine_of(decode).check_integrity()
        await decode.until_idle()


async def test_pushed_kv_that_was_changed_is_found(llama: Path) -> None:
    """With checksums, what stands in the room must be what the prefill side computed."""
    async with pair_of(llama) as pair, pair.handoff(ask(prompt_of(50), 8), Rendezvous.PUSH) as handoff:
        room = await handoff.reserve()
        await handoff.prefill()
        await handoff.export()
        desk = engine_of(pair.decode)._desk
        assert desk is not None
        thread = engine_of(pair.decode)._thread
        assert thread is not None
        block = desk._rooms[room.session].fresh[1]
        pool = thread.kv_pools[0]
        pool.views[0][block * pool.regions[0].stride] ^= 1
        with pytest.raises(EngineError, match="is not what it computed"):
            await handoff.import_()


async def test_prompt_logprobs_without_the_prefill_sides_token(llama: Path) -> None:
    """They can only be had by computing the prompt, which is then done, in place of the KV that came."""
    async with pair_of(llama) as pair:
        request = ask(prompt_of(40), 4, prompt_logprobs=2)
        expected = await pair.prefill.complete(request)
        async with pair.handoff(request, Rendezvous.PULL) as handoff:
            await handoff.reserve()
            await handoff.prefill()
            ticket = await handoff.export()
            await handoff.read(msgspec.structs.replace(ticket, first=None))
            run = await handoff.finish()
        assert run.tokens == expected.tokens
        assert run.prompt_logprobs is not None
        assert len(run.prompt_logprobs) == 40


async def test_aggregated_workers_hold_no_kv_for_others(llama: Path) -> None:
    """The hooks say so."""
    async with make_target(llama, Role.AGGREGATED) as target:
        await target.complete(ask([5, 6]))
        for call in (target.host.prefill(ask([5, 6])), target.host.reserve_kv(ask([5, 6])), target.host.export_kv("x")):
            with pytest.raises(EngineError, match="prefills and decodes by itself"):
                await call
        await target.host.release_kv("x")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"kv_secret": "short"}, "secret has 5 bytes"),
        ({"kv_lease": 0.0}, "kv-lease is 0 s"),
        ({"kv_host": "203.0.113.9"}, "cannot listen on 203.0.113.9"),
        ({"engine_args": {"kv_layout": "DHN"}}, "kv_layout is 'DHN'"),
        ({"engine_args": {"kv_shards": 2}}, "kv_layout must be HND"),
        ({"engine_args": {"kv_shards": 0}}, "kv_shards is 0"),
        ({"engine_args": {"kv_shards": 3, "kv_layout": "HND"}}, "kv_shards is 3"),
    ],
)
async def test_settings_that_cannot_work(config: dict[str, Any], says: str, llama: Path) -> None:
    """One sentence each, at start."""
    with pytest.raises(ConfigError, match=says):
        async with make_target(llama, Role.PREFILL, **config):
            pass


async def test_kv_that_has_no_words_is_not_moved(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where layers differ in shape an engine serves alone, and says at start that it cannot serve another."""
    monkeypatch.setattr("engines.torch.start.layouts_of", lambda *_: [])
    async with make_target(llama, Role.AGGREGATED) as target:
        assert target.host.info.kv_fingerprint == {}
        await target.complete(ask([5, 6]))
    with pytest.raises(ConfigError, match="differ in shape"):
        async with make_target(llama, Role.DECODE):
            pass


async def test_fingerprints_are_of_the_model(llama: Path, model_of: Callable[[str], Path], tmp_path: Path) -> None:
    """The same files elsewhere are the same model; other weights of the same shape are not, and their KV is refused."""
    elsewhere = shutil.copytree(llama, tmp_path / "elsewhere")
    other = save_model(tmp_path / "other", "llama")
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, other / "model.safetensors")
    fingerprints = []
    for folder in (llama, elsewhere, other, model_of("qwen3")):
        async with make_target(folder, Role.PREFILL, worker_id=f"of {folder.name}") as target:
            await target.complete(ask([5, 6]))
            fingerprints.append(target.host.info.kv_fingerprint)
    assert fingerprints[0] == fingerprints[1]
    assert compare(fingerprints[0], fingerprints[2], canonical=True)[0].field == "model"
    assert compare(fingerprints[0], fingerprints[3], canonical=True)


def _stalled(target: Target) -> bool:
    """Whether the engine has found no room for anything, and waits to be told of some."""
    thread = engine_of(target)._thread
    assert thread is not None
    return thread._stepper is not None and thread._stepper.stalled


def _refusal(grants: Any, session: str) -> EngineError | None:
    try:
        grants.require(session, (), "read")
    except EngineError as error:
        return error
    return None
