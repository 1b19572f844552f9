"""Tickets are good for one use by one worker, and everything else is refused in a sentence."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.kv.ticket import Holder, TicketGate, TicketKey, TicketRefused, decode_ticket, encode_ticket, seal
from core.messages import ConfigError, Delta, KvTicket, Rendezvous

KEY = TicketKey("one deployment's secret")
HOLDER = Holder("p0", "life1")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain() -> KvTicket:
    return KvTicket(
        engine="torch",
        engine_version="1",
        fingerprint={"b": "2", "a": "1"},
        session="s1",
        worker_id="p0",
        rendezvous=Rendezvous.PULL,
        expires_in=30.0,
        num_tokens=17,
        canonical=True,
        payload={"blocks": [3, 1, 2], "address": b"\x00\xff", "deep": {"z": 1, "y": [None, 2.5]}},
    )


def sealed(key: TicketKey = KEY, **changes: object) -> KvTicket:
    terms = {"holder": HOLDER, "audience": "d0", "request_id": "r1", "expires_in": 9.0, "first": Delta([7])}
    return seal(plain(), key, **{**terms, **changes})


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def gate(clock):
    return TicketGate(KEY, "d0", clock=clock)


def test_a_good_ticket_is_admitted_also_after_a_journey(gate):
    ticket = decode_ticket(encode_ticket(sealed()))
    gate.admit(ticket, holder=HOLDER, request_id="r1")
    assert ticket.first == Delta([7])
    assert ticket.expires_in == 9.0


def test_a_ticket_never_promises_more_than_the_engine():
    assert sealed(expires_in=99.0).expires_in == 30.0


CHANGED = {
    "engine": "vllm",
    "engine_version": "2",
    "fingerprint": {"a": "1", "b": "3"},
    "session": "s2",
    "worker_id": "p1",
    "rendezvous": Rendezvous.PUSH,
    "expires_in": 9.5,
    "num_tokens": 18,
    "canonical": False,
    "payload": {"blocks": [3, 1, 4]},
    "first": Delta([8]),
    "incarnation": "life2",
    "audience": "d1",
    "request_id": "r2",
    "nonce": "0",
}


def test_every_field_is_under_the_signature():
    assert set(CHANGED) == set(KvTicket.__struct_fields__) - {"schema", "mac"}


@pytest.mark.parametrize("field", CHANGED)
def test_a_changed_field_is_refused(gate, field):
    forged = msgspec.structs.replace(sealed(), **{field: CHANGED[field]})
    with pytest.raises(TicketRefused, match="not signed with this deployment's secret"):
        gate.admit(forged, holder=HOLDER, request_id="r1")


@given(place=st.integers(0, 31), bit=st.integers(0, 7))
def test_no_other_signature_will_do(place, bit):
    ticket = sealed()
    mac = bytearray(ticket.mac)
    mac[place] ^= 1 << bit
    for forged in (bytes(mac), b"", ticket.mac[:-1], ticket.mac + b"\0"):
        with pytest.raises(TicketRefused, match="not signed"):
            TicketGate(KEY, "d0").admit(msgspec.structs.replace(ticket, mac=forged), holder=HOLDER, request_id="r1")


@pytest.mark.parametrize(
    ("changes", "holder", "request_id", "sentence"),
    [
        ({"audience": "d1"}, HOLDER, "r1", "made for worker 'd1', this is 'd0'"),
        ({"request_id": "r2"}, HOLDER, "r1", "made for request 'r2', not for 'r1'"),
        ({}, Holder("p0", "life2"), "r1", r"made by p0 \(life life1\), but the task is with p0 \(life life2\)"),
        ({}, Holder("p1", "life1"), "r1", r"made by p0 \(life life1\), but the task is with p1"),
    ],
)
def test_a_foreign_ticket_is_refused(gate, changes, holder, request_id, sentence):
    with pytest.raises(TicketRefused, match=sentence) as error:
        gate.admit(sealed(**changes), holder=holder, request_id=request_id)
    assert error.value.retryable


def test_a_ticket_of_another_deployment_is_refused(gate):
    with pytest.raises(TicketRefused, match="same kv-secret"):
        gate.admit(sealed(TicketKey("another deployment's secret")), holder=HOLDER, request_id="r1")


def test_a_stale_ticket_is_refused(gate):
    gate.admit(sealed(), holder=HOLDER, request_id="r1", age=8.9)
    with pytest.raises(TicketRefused, match=r"9\.000 s old and was good for 9\.000 s.*raise kv-lease"):
        gate.admit(sealed(), holder=HOLDER, request_id="r1", age=9.0)


def test_a_ticket_is_good_once(gate, clock):
    ticket = sealed()
    gate.admit(ticket, holder=HOLDER, request_id="r1")
    clock.now += 8.9
    with pytest.raises(TicketRefused, match="used before"):
        gate.admit(ticket, holder=HOLDER, request_id="r1")


def test_what_was_seen_is_forgotten_when_it_is_of_no_more_use(gate, clock):
    for _ in range(100):
        gate.admit(sealed(), holder=HOLDER, request_id="r1")
    clock.now += 9.1
    gate.admit(sealed(), holder=HOLDER, request_id="r1")
    assert len(gate._seen) == 1


def test_a_ticket_of_another_schema_is_refused(gate):
    with pytest.raises(TicketRefused, match="schema 2, this worker reads 1"):
        gate.admit(msgspec.structs.replace(sealed(), schema=2), holder=HOLDER, request_id="r1")


@given(st.integers(0, 400))
def test_a_truncated_ticket_is_refused(length):
    data = encode_ticket(sealed())
    if length < len(data):
        with pytest.raises(TicketRefused, match=f"of {length} bytes cannot be read"):
            decode_ticket(data[:length])


@given(st.binary(max_size=200))
def test_noise_is_no_ticket(data):
    with pytest.raises(TicketRefused):
        decode_ticket(data)


def test_a_short_secret_is_refused():
    with pytest.raises(ConfigError, match="kv-secret has 5 bytes"):
        TicketKey("short")


def test_without_a_secret_every_key_is_another():
    ticket = sealed(TicketKey())
    with pytest.raises(TicketRefused):
        TicketGate(TicketKey(), "d0").admit(ticket, holder=HOLDER, request_id="r1")
