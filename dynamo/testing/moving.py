"""KV on its way: room, tickets, leases, and that nothing is moved, kept or lost that should not be."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest

from core.kv.ticket import Holder, TicketKey, TicketRefused, encode_ticket, seal
from core.kv.transfer import CanonicalKv
from dynamo import EngineError, EngineRequest, KvTicket, Overloaded, Rendezvous
from dynamo.testing.handing import KINDS
from dynamo.testing.kit import Conformance, Kit
from dynamo.testing.pair import REPLACE, Handoff, Pair
from dynamo.testing.rule import rule
from dynamo.testing.run import within

ROLES = ("roles.prefill", "roles.decode")
MIB = 1 << 20


class Moving(Conformance):
    """Rules about `reserve_kv`, `export_kv`, `import_kv` and `release_kv`, hook by hook."""

    @KINDS
    @rule(*ROLES, "prefix_caching")
    async def test_only_missing_blocks_are_asked_for(self, pair: Pair, kind: Rendezvous) -> None:
        """A reservation counts the blocks that the decode side has, which need not be moved; the answer is the same."""
        pair.require(kind)
        size = pair.decode.block_size
        prefix = pair.decode.prompt(3 * size, f"missing {kind}")
        plain = None
        for tail, cached in ((f"a {kind}", 0), (f"b {kind}", 3 * size), (f"a {kind}", 4 * size)):
            prompt = prefix + pair.decode.prompt(size + 3, tail)
            async with pair.handoff(pair.decode.ask(prompt, 8), kind) as handoff:
                await handoff.arrive()
                assert handoff.room is not None
                assert (handoff.room.num_tokens, handoff.room.cached_tokens) == (len(prompt), cached), tail
                run = await handoff.finish()
            if tail.startswith("a"):
                plain = plain or run.tokens
                assert run.tokens == plain, "the answer changed when less was moved"

    @KINDS
    @rule(*ROLES, "prefix_caching")
    async def test_imported_blocks_are_reused(self, pair: Pair, kind: Rendezvous) -> None:
        """What was imported is in the decode side's prefix cache, as if computed there, and KV events say so."""
        pair.require(kind)
        decode = pair.decode
        prompt = decode.prompt(4 * decode.block_size + 2, f"reused {kind}")
        run = await pair.hand_over(decode.ask(prompt, 4), kind)
        if decode.can.kv_events:
            await decode.until_cached(decode.ask(prompt))
        local = await decode.generate(prompt, 4)
        assert (local.tokens, local.cached_tokens) == (run.tokens, 4 * decode.block_size)

    @rule(*ROLES, "prefix_caching")
    async def test_salt_separates_imported_blocks(self, pair: Pair) -> None:
        """Imported blocks are reused within their cache salt only."""
        decode = pair.decode
        prompt = decode.prompt(2 * decode.block_size + 2, "imported salt")
        await pair.hand_over(decode.ask(prompt, 2, cache_salt="alice"), pair.kinds[0])
        for salt, cached in (("bob", 0), ("alice", 2 * decode.block_size)):
            room = await decode.host.reserve_kv(decode.ask(prompt, 2, cache_salt=salt))
            await decode.host.release_kv(room.session)
            assert room.cached_tokens == cached, f"salt {salt}"

    @KINDS
    @rule(*ROLES)
    async def test_released_at_every_state(self, pair: Pair, kind: Rendezvous) -> None:
        """Whatever has been done, releasing both sides frees everything; twice, and unknown sessions, are no error."""
        pair.require(kind)
        for state in range(5):
            async with pair.handoff(_request(pair, f"state {state} {kind}"), kind) as handoff:
                steps = (handoff.reserve, handoff.prefill, handoff.export, handoff.import_)
                for step in steps[:state]:
                    await step()
                if kind is not Rendezvous.HANDSHAKE:
                    await handoff.release()
                    await handoff.release()
            await handoff.release()
            await pair.until_released()
        for target in (pair.prefill, pair.decode):
            await target.host.release_kv("no-such-session")

    @rule(*ROLES, "rendezvous.pull")
    async def test_held_blocks_are_used_blocks(self, pair: Pair) -> None:
        """Prefilled KV, and room for it, count as used blocks of an unfinished request until they are released."""
        async with pair.handoff(_request(pair, "counted"), Rendezvous.PULL) as handoff:
            await handoff.reserve()
            await handoff.prefill()
            blocks = -(-len(handoff.request.token_ids) // pair.decode.block_size)
            for target in (pair.prefill, pair.decode):
                await target.until(lambda at=target: at.load().kv_blocks_used >= blocks, "held blocks count")  # type: ignore[misc]
                assert target.load().running + target.load().waiting == 1
        await pair.until_released()

    @rule(*ROLES, "rendezvous.pull")
    async def test_held_blocks_are_not_evicted(self) -> None:
        """KV that waits to be fetched survives traffic that needs all the rest of the cache."""
        async with self.kit.fresh_pair(prefill=await _small(self.kit)) as pair:
            prefill = pair.prefill
            request = _request(pair, "pinned")
            expected = (await pair.decode.complete(pair.decode.renamed(request))).tokens
            async with pair.handoff(request, Rendezvous.PULL) as handoff:
                await handoff.reserve()
                await handoff.prefill()
                room = (prefill.host.info.num_kv_blocks - 6) * prefill.block_size
                traffic = [prefill.ask(prefill.prompt(room // 4, f"traffic {n}"), 8) for n in range(12)]
                await prefill.together(traffic)
                await handoff.export()
                await handoff.import_()
                assert (await handoff.finish()).tokens == expected
            await pair.until_released()

    @rule(*ROLES)
    async def test_room_runs_out(self) -> None:
        """Where there is no room, reserve_kv raises Overloaded, holds nothing more, and works again after a release."""
        async with self.kit.fresh_pair(decode=await _small(self.kit)) as pair:
            decode = pair.decode
            total = decode.host.info.num_kv_blocks * decode.block_size
            length = min(total // 4, decode.host.info.max_model_len - 8)
            requests = [decode.ask(decode.prompt(length, f"room {number}"), 4) for number in range(9)]
            rooms = []
            with contextlib.suppress(Overloaded):
                for request in requests:
                    room = await decode.host.reserve_kv(request)
                    rooms.append(room)
            with pytest.raises(Overloaded):
                await decode.host.reserve_kv(requests[-1])
            assert 2 <= len(rooms) <= total // length, f"{len(rooms)} prompts of {length} tokens fit into {total}"
            for room in rooms:
                await decode.host.release_kv(room.session)
            await decode.until_idle()
            room = await decode.host.reserve_kv(decode.ask(decode.prompt(length, "again"), 4))
            await decode.host.release_kv(room.session)
            await pair.until_released()

    @rule(*ROLES)
    async def test_room_is_for_its_request(self, pair: Pair) -> None:
        """decode refuses a reservation without KV, one that was released, and one that it has decoded already."""
        async with pair.handoff(_request(pair, "empty room"), pair.kinds[0]) as handoff:
            await handoff.reserve()
            await _refused(handoff)
            await handoff.release_room()
            await _refused(handoff)
        async with pair.handoff(_request(pair, "used room"), pair.kinds[0]) as handoff:
            await handoff.arrive()
            await handoff.finish()
            await _refused(handoff)

    @rule(*ROLES, "rendezvous.pull")
    async def test_late_pull_is_refused(self, pair: Pair) -> None:
        """KV that its holder has let go of is refused, never read: whatever its blocks hold now, no token is wrong."""
        prefill, decode = pair.prefill, pair.decode
        request = _request(pair, "late pull")
        expected = (await decode.complete(decode.renamed(request))).tokens
        salted = REPLACE(request, cache_salt="late")  # so that the decode side has nothing of it
        async with pair.handoff(salted, Rendezvous.PULL) as handoff:
            await handoff.reserve()
            await handoff.prefill()
            await handoff.export()
            await handoff.release_prefill()
            await prefill.until_idle()
            await prefill.together(prefill.ask(prefill.prompt(40, f"overwrite {n}"), 4) for n in range(8))
            with pytest.raises(EngineError) as late:
                await handoff.import_()
            assert late.value.retryable, f"another prefill could succeed: {late.value!r}"
            await _refused(handoff)
        assert (await decode.complete(decode.renamed(salted))).tokens == expected

    @rule(*ROLES, "rendezvous.pull")
    async def test_no_time_left(self, pair: Pair) -> None:
        """KV that cannot be read in time is refused and not used; the room then takes another ticket's."""
        request = _request(pair, "no time")
        expected = (await pair.decode.complete(pair.decode.renamed(request))).tokens
        async with pair.handoff(REPLACE(request, cache_salt="no time"), Rendezvous.PULL) as handoff:
            await handoff.reserve()
            await handoff.prefill()
            await handoff.export()
            for seconds in (0.0, 1e-6):
                with pytest.raises(EngineError) as late:
                    await handoff.read(seconds=seconds)
                assert late.value.retryable
                await _refused(handoff)
            await handoff.import_()
            assert (await handoff.finish()).tokens == expected

    @rule(*ROLES, "rendezvous.pull")
    async def test_import_twice(self, pair: Pair) -> None:
        """KV that is delivered twice is refused the second time, or is a no-op, and changes no token."""
        request = _request(pair, "twice")
        expected = (await pair.decode.complete(pair.decode.renamed(request))).tokens
        async with pair.handoff(REPLACE(request, cache_salt="twice"), Rendezvous.PULL) as handoff:
            await handoff.arrive()
            with contextlib.suppress(EngineError):
                await handoff.read()
            with pytest.raises(TicketRefused, match="used before"):
                await handoff.import_()
            assert (await handoff.finish()).tokens == expected

    @rule(*ROLES, "rendezvous.pull")
    async def test_tickets_cannot_be_forged(self, pair: Pair) -> None:
        """A ticket that was changed, or was made for another worker, life, request or deployment, is refused."""
        request = _request(pair, "forged")
        async with pair.handoff(request, Rendezvous.PULL) as handoff:
            await handoff.reserve()
            await handoff.prefill()
            good = await handoff.export()

            def made(key: TicketKey = pair.key, **changes: Any) -> KvTicket:
                fields: dict[str, Any] = {"holder": pair.holder, "audience": pair.audience}
                fields |= {"request_id": request.request_id, "expires_in": good.expires_in, "first": good.first}
                return seal(good, key, **fields | changes)

            forged = {
                "changed": REPLACE(good, num_tokens=good.num_tokens - 1),
                "of another session": REPLACE(good, session="another"),
                "of another deployment": made(TicketKey()),
                "for another worker": made(audience="another"),
                "for another request": made(request_id="another"),
                "of an earlier life": made(holder=Holder(pair.holder.worker_id, "earlier")),
            }
            for what, ticket in forged.items():
                try:
                    await handoff.import_(ticket)
                except TicketRefused:
                    continue
                pytest.fail(f"a ticket {what} was taken")
            await handoff.import_(good)

    @rule(*ROLES, "rendezvous.pull")
    async def test_other_fingerprint(self, pair: Pair) -> None:
        """KV of another model is refused by the engine itself, in a sentence with the field and both values."""
        mine = pair.decode.host.info.kv_fingerprint
        assert mine == pair.prefill.host.info.kv_fingerprint, "two engines of one configuration differ"
        for field in mine.keys() & {"model", "dtype", "layers", "rope"}:
            async with pair.handoff(_request(pair, f"fingerprint {field}"), Rendezvous.PULL) as handoff:
                await handoff.reserve()
                await handoff.prefill()
                ticket = await handoff.export()
                other = REPLACE(ticket, fingerprint=ticket.fingerprint | {field: "something else"})
                with pytest.raises(EngineError) as refused:
                    await handoff.read(other)
                for word in (field, mine[field], "something else"):
                    assert word in str(refused.value), f"{word!r} is missing in: {refused.value}"

    @rule(*ROLES, "canonical_kv", "rendezvous.pull")
    async def test_blocks_outside_the_session(self, pair: Pair) -> None:
        """A ticket opens the blocks of its own session and no others."""
        async with (
            pair.handoff(_request(pair, "mine"), Rendezvous.PULL) as mine,
            pair.handoff(_request(pair, "theirs"), Rendezvous.PULL) as theirs,
        ):
            for handoff in (mine, theirs):
                await handoff.reserve()
                await handoff.prefill()
                await handoff.export()
            assert mine.ticket is not None
            assert theirs.ticket is not None
            kv = msgspec.convert(mine.ticket.payload, CanonicalKv)
            other = msgspec.convert(theirs.ticket.payload, CanonicalKv)
            stolen = CanonicalKv(kv.session, kv.num_tokens, other.shards)
            guessed = CanonicalKv("guessed", kv.num_tokens, kv.shards)
            for payload in (stolen, guessed):
                ticket = REPLACE(mine.ticket, payload=msgspec.to_builtins(payload, builtin_types=(bytes,)))
                with pytest.raises(EngineError):
                    await mine.read(REPLACE(ticket, session=payload.session))
                await _refused(mine)

    @rule(*ROLES)
    async def test_tickets_fit_into_a_message(self, pair: Pair) -> None:
        """A ticket, and a reservation, of the longest prompt can be sent: plain data, below 1 MiB."""
        decode = pair.decode
        longest = decode.ask(decode.prompt(decode.host.info.max_model_len - 4, "longest"), 4)
        async with pair.handoff(longest, pair.kinds[0]) as handoff:
            room = await handoff.reserve()
            assert len(msgspec.msgpack.encode(room)) < MIB
            await handoff.prefill()
            assert len(encode_ticket(await handoff.export())) < MIB

    @rule(*ROLES)
    async def test_unknown_session(self, pair: Pair) -> None:
        """export_kv of an unknown or released session, and import_kv into one, raise EngineError."""
        async with pair.handoff(_request(pair, "unknown"), Rendezvous.PULL) as handoff:
            if Rendezvous.PULL not in pair.kinds:
                pytest.skip("not applicable: with this rendezvous sessions are named before they exist")
            await handoff.reserve()
            await handoff.prefill()
            await handoff.export()
            assert handoff.result is not None
            await handoff.release_prefill()
            for session in (handoff.result.session, "unknown"):
                with pytest.raises(EngineError):
                    await within(self.step_timeout, pair.prefill.host.export_kv(session), "export_kv")
            await handoff.release_room()
            with pytest.raises(EngineError):
                await handoff.read()


def _request(pair: Pair, key: str) -> EngineRequest:
    decode = pair.decode
    return decode.ask(decode.prompt(3 * decode.block_size + 2, key), 8)


async def _small(kit: Kit) -> dict[str, object]:
    """Room for 32 blocks."""
    info = (await kit.pair()).decode.host.info
    return {"num_kv_blocks": 32, "max_model_len": min(info.max_model_len, 24 * info.block_size)}


async def _refused(handoff: Handoff) -> None:
    """Asserts that the room cannot be decoded."""
    async with handoff.stream() as stream:
        with pytest.raises(EngineError):
            await stream.next()
