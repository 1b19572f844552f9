"""Any interleaving of finish, failure, abort, crash, expiry, and of lost, late and repeated messages ends well.

The pure state machines of one decode worker and of all attempts run against a model of everything around them: engines
that hold KV, a network that loses, repeats and reorders, a queue that redelivers, clocks that may strike at any time.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.kv.lease import LeaseTerms
from core.kv.session import KvLedger, LeaseRefused, Outcome
from core.messages import Rendezvous
from core.prefill import decode_table as dt
from core.prefill import prefill_table as pt
from core.prefill.messages import FailureKind
from core.prefill.session import DecodeSession, WorkerSession

MAX_ATTEMPTS = 3
TERMS = LeaseTerms(lease=10.0, guard=1.0)
NOW = 0.0
LATER = 100.0
FATES = ["good", "ended", "aborted", "error", "rejected", "no room"]
WRITING = (pt.S.PREFILLING, pt.S.EXPORTING, pt.S.OPENING, pt.S.MEETING)


class Queue:
    """One task's place in the queue."""

    def __init__(self) -> None:
        self.state = "out"
        self.owner: str | None = None
        self.tries = 0
        self.failed = False
        self.cancelled = False
        self.dead = False

    def leave(self, attempt: str, *, dead: bool = False) -> None:
        if self.owner == attempt:
            self.state, self.owner, self.dead = "gone", None, dead

    def back(self, attempt: str, *, tried: bool) -> None:
        if self.owner == attempt:
            self.owner = None
            self.state = "gone" if self.cancelled else "waiting"
            self.tries -= not tried

    def cancel(self) -> None:
        self.cancelled = True
        if self.state == "waiting":
            self.state = "gone"


class Worker:
    """One attempt on a prefill worker, with the engine that it drives."""

    def __init__(self, world: World, attempt: str, *, last: bool) -> None:
        self.world = world
        self.attempt = attempt
        self.machine = WorkerSession(world.kind, last=last)
        self.ledger = KvLedger()
        self.alive = True
        self.asking = self.armed = self.leased = self.engine_holds = False
        self.running: set[str] = set()
        self.room: str | None = None
        self.ended = False

    @property
    def writing(self) -> bool:
        return self.alive and self.room is not None and self.machine.state in WRITING

    def happen(self, event: pt.E, **facts: object) -> None:
        actions = self.machine.step(event, **facts)
        for action in actions:
            self.do(action, actions)

    def do(self, action: pt.A, actions: list[pt.A]) -> None:
        world = self.world
        if action is pt.A.ASK:
            self.asking = True
            world.send("taken", self.attempt)
        elif action in (pt.A.PREFILL, pt.A.EXPORT):
            self.running.add(action.name)
            self.engine_holds = True
        elif action in (pt.A.ABORT_PREFILL, pt.A.CANCEL_EXPORT):
            self.running.discard("PREFILL" if action is pt.A.ABORT_PREFILL else "EXPORT")
            if action is pt.A.ABORT_PREFILL and not self.leased:
                self.engine_holds = False
        elif action is pt.A.RELEASE and not self.leased:
            self.engine_holds = False
        elif action is pt.A.OPEN_LEASE:
            self.ledger.open("kv", TERMS, NOW)
            self.leased = True
        elif action in (pt.A.END_LEASE, pt.A.END_IMPORTED):
            outcome = self.machine.facts.outcome or Outcome.RELEASED
            if self.ledger.settle("kv", Outcome.IMPORTED if action is pt.A.END_IMPORTED else outcome):
                self.engine_holds = False
        elif action is pt.A.SEND_READY:
            world.send("ready", self.attempt, ended=self.ended)
        elif action is pt.A.SEND_FAILED:
            kind = FailureKind.RETRYABLE
            if pt.A.BURY in actions:
                kind = FailureKind.POISONED
            elif pt.A.ACK in actions:
                kind = FailureKind.REJECTED
            assert not self.engine_holds or self.leased, "said to be over, and still held"
            world.send("failed", self.attempt, failure=kind)
        elif action is pt.A.ANSWER_CLAIM:
            try:
                self.ledger.claim("kv", "", NOW)
                world.send("claimed", self.attempt)
            except LeaseRefused:
                world.send("claim failed", self.attempt)
        elif action is pt.A.REFUSE_CLAIM:
            world.send("claim failed", self.attempt)
        elif action in (pt.A.ACK, pt.A.BURY):
            world.queue.leave(self.attempt, dead=action is pt.A.BURY)
        elif action in (pt.A.RETRY, pt.A.RETURN):
            world.queue.back(self.attempt, tried=action is pt.A.RETRY)
            world.queue.failed |= action is pt.A.RETRY
        elif action in (pt.A.ARM_ANSWER, pt.A.ARM_PREFILL):
            self.armed = True
        elif action is pt.A.DISARM:
            self.armed = False

    def complete(self, what: str, fate: str) -> None:
        """An engine call returns."""
        self.running.discard(what)
        if what == "PREFILL":
            if fate in ("good", "ended", "aborted"):
                self.ended = fate == "ended" and self.world.kind is not Rendezvous.HANDSHAKE
                self.happen(pt.E.PREFILLED, aborted=fate == "aborted", ended=self.ended)
            else:
                if not self.leased:
                    self.engine_holds = False
                self.happen(pt.E.PREFILL_FAILED, rejected=fate == "rejected", blameless=fate == "no room")
        elif fate == "good":
            self.happen(pt.E.EXPORTED)
        else:
            self.happen(pt.E.EXPORT_FAILED, rejected=fate == "rejected", blameless=fate == "no room")

    def expire(self) -> None:
        for _, _outcome in self.ledger.expire(LATER):
            self.engine_holds = False
            self.happen(pt.E.EXPIRED)

    def die(self) -> None:
        self.alive = self.engine_holds = False
        self.running.clear()
        if self.world.queue.owner == self.attempt:
            self.world.queue.back(self.attempt, tried=True)


class World(RuleBasedStateMachine):
    """See the module."""

    @initialize(kind=st.sampled_from(list(Rendezvous)), fallback=st.booleans())
    def begin(self, kind: Rendezvous, fallback: bool) -> None:
        self.kind = kind
        self.decode = DecodeSession(fallback=fallback)
        self.rooms = KvLedger()
        self.engine_rooms: set[str] = set()
        self.alive = True
        self.room: str | None = None
        self.late: str | None = None
        self.taken_over: str | None = None
        self.exposed: dict[str, str] = {}
        self.granted: set[str] = set()
        self.running: set[str] = set()
        self.armed = False
        self.plans: list[dt.A] = []
        self.queue = Queue()
        self.workers: dict[str, Worker] = {}
        self.network: list[tuple[str, str, dict[str, object]]] = []
        self.happen(dt.E.START)

    def send(self, what: str, attempt: str, **facts: object) -> None:
        self.network.append((what, attempt, facts))

    # The decode side.

    def happen(self, event: dt.E, attempt: str = "", **facts: object) -> None:
        for action, concerned in self.decode.step(event, attempt, **facts):
            self.do(action, concerned)

    def do(self, action: dt.A, attempt: str) -> None:
        if action is dt.A.RESERVE:
            self.running.add("reserve")
        elif action is dt.A.SUBMIT:
            self.running.add("submit")
        elif action is dt.A.CANCEL_TASK:
            self.queue.cancel()
        elif action is dt.A.GRANT:
            assert self.room is not None
            if self.kind is not Rendezvous.PULL and attempt not in self.granted:
                self.rooms.expose(self.room, NOW)
                self.exposed[attempt] = self.room
            self.granted.add(attempt)
            self.send("proceed", attempt, room=None if self.kind is Rendezvous.PULL else self.room)
        elif action in (dt.A.REFUSE, dt.A.REFUSE_CURRENT):
            self.send("gone", attempt)
        elif action in (dt.A.LET_GO, dt.A.LET_GO_CURRENT):
            self.send("settle", attempt, outcome=Outcome.RELEASED)
        elif action is dt.A.SETTLE:
            self.send("settle", attempt, outcome=Outcome.IMPORTED)
        elif action is dt.A.CONCEAL:
            self.conceal(attempt)
        elif action is dt.A.DROP_ROOM:
            room, self.room = self.room, None
            if room is not None and self.rooms.settle(room, Outcome.RELEASED):
                self.free(room)
        elif action is dt.A.DROP_LATE_ROOM:
            assert self.late is not None
            if self.rooms.settle(self.late, Outcome.RELEASED):
                self.free(self.late)
            self.late = None
        elif action is dt.A.CLAIM:
            self.send("claim", attempt)
        elif action is dt.A.IMPORT:
            self.running.add("import")
        elif action is dt.A.CANCEL_IMPORT:
            self.running.discard("import")
        elif action is dt.A.DECODE:
            assert self.room is not None
            assert self.rooms.settle(self.room, Outcome.IMPORTED)
            self.taken_over, self.room = self.room, None
            self.running.add("stream")
        elif action is dt.A.DECODE_LOCALLY:
            self.running.add("stream")
        elif action is dt.A.FREE_ROOM:
            assert self.taken_over is not None
            self.engine_rooms.discard(self.taken_over)
        elif action.name.startswith("ARM_"):
            self.armed = True
        elif action is dt.A.DISARM:
            self.armed = False
        if action in (dt.A.DECODE, dt.A.DECODE_LOCALLY, dt.A.EMIT_FIRST, dt.A.FINISH_ABORTED, dt.A.FAIL):
            self.plans.append(action)

    def conceal(self, attempt: str) -> None:
        room = self.exposed.pop(attempt, None)
        if room is not None and self.rooms.conceal(room) is not None:
            self.free(room)

    def free(self, room: str) -> None:
        """The engine may now use the blocks for something else: nobody may write to them any more."""
        for worker in self.workers.values():
            assert not (worker.writing and worker.room == room), f"{room} is freed under its writer"
        self.engine_rooms.discard(room)

    def complete(self, what: str, fate: str) -> None:
        self.running.discard(what)
        if what == "reserve":
            if fate not in ("good", "ended"):
                self.happen(dt.E.RESERVE_FAILED, rejected=fate == "rejected")
                return
            name = f"room{len(self.exposed) + len(self.engine_rooms)}-{self.rooms.counts().opened}"
            self.rooms.open(name, TERMS, NOW)
            self.engine_rooms.add(name)
            if self.decode.state in (dt.S.RESERVING, dt.S.REPLACING, dt.S.RENEWING):
                self.room = name
            else:
                self.late = name
            self.happen(dt.E.RESERVED)
        elif what == "submit":
            if fate != "no room":
                self.queue.state = "gone" if self.queue.cancelled else "waiting"
            self.happen(dt.E.SUBMITTED if fate in ("good", "ended") else dt.E.SUBMIT_FAILED)
        elif what == "import":
            self.happen(dt.E.IMPORTED if fate in ("good", "ended") else dt.E.IMPORT_FAILED)
        else:
            self.happen(dt.E.STREAM_ENDED)

    # What can happen.

    def deliver(self, index: int, *, keep: bool = False) -> None:
        what, attempt, facts = self.network[index] if keep else self.network.pop(index)
        if what in ("taken", "ready", "failed", "claimed", "claim failed", "noted"):
            self.deliver_to_decode(what, attempt, facts)
            return
        worker = self.workers[attempt]
        if not worker.alive:
            if what == "claim":
                self.send("claim failed", attempt)
            return
        if what in ("proceed", "gone"):
            if worker.asking:
                worker.asking = False
                if what == "proceed":
                    worker.room = facts["room"]
                worker.happen(pt.E.PROCEED if what == "proceed" else pt.E.GONE)
        elif what == "claim":
            worker.happen(pt.E.CLAIM)
        elif what == "settle":
            worker.happen(pt.E.SETTLED, outcome=facts["outcome"])
            self.send("noted", attempt)

    def deliver_to_decode(self, what: str, attempt: str, facts: dict[str, object]) -> None:
        worker = self.workers.get(attempt)
        if not self.alive:
            if worker is not None and worker.alive:
                if what == "taken" and worker.asking:
                    worker.asking = False
                    worker.happen(pt.E.NOBODY)
                elif what == "ready":
                    worker.happen(pt.E.NOBODY)
            return
        if what == "taken":
            self.happen(dt.E.TAKEN, attempt, rendezvous=self.kind)
        elif what == "ready":
            self.happen(dt.E.READY, attempt, ended=facts["ended"])
        elif what == "failed":
            self.happen(dt.E.FAILED, attempt, failure=facts["failure"])
        elif what == "noted":
            self.conceal(attempt)
        elif self.decode.facts.current == attempt:
            self.happen(dt.E.CLAIMED if what == "claimed" else dt.E.CLAIM_FAILED)

    @precondition(lambda self: self.network)
    @rule(data=st.data(), keep=st.sampled_from([False, False, False, True]))
    def a_message_arrives(self, data, keep):
        self.deliver(data.draw(st.integers(0, len(self.network) - 1)), keep=keep)

    @precondition(lambda self: self.network)
    @rule(data=st.data())
    def a_message_is_lost(self, data):
        self.network.pop(data.draw(st.integers(0, len(self.network) - 1)))

    @precondition(lambda self: self.alive and self.running)
    @rule(data=st.data(), fate=st.sampled_from([*FATES, "good", "good", "good"]))
    def something_of_decode_completes(self, data, fate):
        self.complete(data.draw(st.sampled_from(sorted(self.running))), fate)

    @precondition(lambda self: any(w.alive and w.running for w in self.workers.values()))
    @rule(data=st.data(), fate=st.sampled_from([*FATES, "good", "good", "good"]))
    def something_of_prefill_completes(self, data, fate):
        worker = data.draw(st.sampled_from([w for w in self.workers.values() if w.alive and w.running]))
        worker.complete(data.draw(st.sampled_from(sorted(worker.running))), fate)

    @precondition(lambda self: self.alive and self.armed)
    @rule()
    def decode_times_out(self):
        self.armed = False
        self.happen(dt.E.TIMEOUT)

    @precondition(lambda self: any(w.alive and w.armed for w in self.workers.values()))
    @rule(data=st.data())
    def prefill_times_out(self, data):
        worker = data.draw(st.sampled_from([w for w in self.workers.values() if w.alive and w.armed]))
        worker.armed = False
        worker.happen(pt.E.TIMEOUT)

    @precondition(lambda self: self.alive and not self.decode.over)
    @rule()
    def the_client_leaves(self):
        self.happen(dt.E.ABORT)

    @precondition(lambda self: self.queue.state == "waiting")
    @rule()
    def a_worker_takes_the_task(self):
        queue = self.queue
        attempt = f"a{len(self.workers)}"
        queue.tries += 1
        if queue.tries > MAX_ATTEMPTS:
            queue.state, queue.dead = "gone", True
            kind = FailureKind.POISONED if queue.failed else FailureKind.ABANDONED
            self.send("failed", "", failure=kind)
            return
        queue.state, queue.owner = "taken", attempt
        worker = self.workers[attempt] = Worker(self, attempt, last=queue.tries == MAX_ATTEMPTS)
        worker.happen(pt.E.START)

    @precondition(lambda self: self.queue.state == "taken")
    @rule()
    def the_queue_loses_sight_of_a_living_worker(self):
        self.queue.state, self.queue.owner = ("gone" if self.queue.cancelled else "waiting"), None

    @precondition(lambda self: any(w.alive for w in self.workers.values()))
    @rule(data=st.data(), how=st.sampled_from(["die", "leave", "expire", "expire", "no answer"]))
    def something_befalls_a_worker(self, data, how):
        worker = data.draw(st.sampled_from([w for w in self.workers.values() if w.alive]))
        if how == "die":
            worker.die()
        elif how == "leave":
            worker.happen(pt.E.LEAVE)
        elif how == "expire":
            worker.expire()
        elif worker.asking:
            worker.asking = False
            worker.happen(pt.E.NO_ANSWER)

    @rule(dice=st.integers(0, 29))
    def decode_dies_now_and_then(self, dice):
        if dice == 17:
            self.alive = self.armed = False
            self.running.clear()
            self.engine_rooms.clear()

    # What must hold, always and in the end.

    @invariant()
    def no_room_has_two_writers(self):
        if hasattr(self, "workers"):
            writers = [worker.room for worker in self.workers.values() if worker.writing]
            assert len(writers) == len(set(writers)), f"two write to one room: {writers}"

    @invariant()
    def books_agree(self):
        if hasattr(self, "rooms"):
            self.rooms.check_integrity()
            assert len(self.plans) <= 1, f"the client gets {self.plans}"
            for worker in self.workers.values():
                worker.ledger.check_integrity()

    def teardown(self):
        if not hasattr(self, "rooms"):
            return
        for _ in range(300):
            if self.network:
                self.deliver(0)
            elif self.alive and self.running:
                self.complete(sorted(self.running)[0], "good")
            elif busy := [w for w in self.workers.values() if w.alive and w.running and not self._meets_nobody(w)]:
                busy[0].complete(sorted(busy[0].running)[0], "good")
            elif self.queue.state == "waiting":
                self.a_worker_takes_the_task()
            elif self.alive and self.armed:
                self.armed = False
                self.happen(dt.E.TIMEOUT)
            elif armed := [w for w in self.workers.values() if w.alive and w.armed]:
                armed[0].armed = False
                armed[0].happen(pt.E.TIMEOUT)
            elif held := [w for w in self.workers.values() if w.alive and w.ledger.live]:
                held[0].expire()
            elif self.alive and self.rooms.live:
                for name, _ in self.rooms.expire(LATER):
                    self.free(name)
            else:
                break
        else:
            raise AssertionError("it does not come to rest")
        if self.alive:
            assert self.decode.over, f"the decode side hangs in {self.decode.state}"
            assert len(self.plans) == 1
            assert self.engine_rooms == set(), "rooms are held for nobody"
        for worker in self.workers.values():
            if worker.alive:
                assert worker.machine.over, f"{worker.attempt} hangs in {worker.machine.state}"
                assert not worker.engine_holds, f"{worker.attempt} holds KV for nobody"
            counts = worker.ledger.counts()
            assert counts.opened == counts.imported + counts.released + counts.expired + counts.live
            assert not worker.alive or counts.live == 0
        assert self.queue.state in ("out", "gone"), f"the task is {self.queue.state}"

    def _meets_nobody(self, worker: Worker) -> bool:
        """A handshake's prefill returns only once it is met; nobody will come here any more."""
        return self.kind is Rendezvous.HANDSHAKE and worker.machine.state is pt.S.MEETING


World.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
test_any_interleaving_ends_well = World.TestCase
