"""A model of everything around the state machines of one remote prefill.

Engines that hold KV, a network that loses, repeats and reorders, a queue that redelivers, deadlines that may pass at
any time. The state machines are the real ones, of one decode worker and of every attempt.

As long as nothing was lost, no worker died and no deadline passed (`World.clean`), all must come to rest without the
help of a deadline or of a lease's end: those are for misfortune, and must not hide a step that was forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from core.kv.lease import LeaseTerms
from core.kv.session import KvLedger, LeaseRefused, Outcome
from core.messages import Rendezvous
from core.prefill import decode_table as dt
from core.prefill import prefill_table as pt
from core.prefill.messages import FailureKind
from core.prefill.session import DecodeSession, WorkerSession

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
        self.delivery = len(world.workers) + 1
        self.machine = WorkerSession(world.kind, last=last)
        self.ledger = KvLedger()
        self.alive = True
        self.asking = self.announcing = self.armed = self.leased = self.engine_holds = False
        self.running: set[str] = set()
        self.echoes: list[pt.E] = []
        """What was under way when it was stopped, and may be heard of all the same."""
        self.room: str | None = None
        self.ended = False

    @property
    def writing(self) -> bool:
        return self.alive and self.room is not None and self.machine.state in WRITING

    @property
    def meets_nobody(self) -> bool:
        """A handshake's prefill returns only once it is met; nobody may come here any more."""
        return self.world.kind is Rendezvous.HANDSHAKE and self.machine.state is pt.S.MEETING

    def happen(self, event: pt.E, **facts: object) -> None:
        actions = self.machine.step(event, **facts)
        for action in actions:
            self.do(action, actions)

    def do(self, action: pt.A, actions: list[pt.A]) -> None:
        world = self.world
        if action is pt.A.ASK:
            self.asking = True
            world.send("taken", self.attempt, delivery=self.delivery)
        elif action in (pt.A.PREFILL, pt.A.EXPORT):
            self.running.add(action.name)
            self.engine_holds = True
        elif action in (pt.A.ABORT_PREFILL, pt.A.CANCEL_EXPORT):
            what = "PREFILL" if action is pt.A.ABORT_PREFILL else "EXPORT"
            if what in self.running:
                self.running.remove(what)
                self.echoes += [pt.E[f"{what}ED" if what == "EXPORT" else "PREFILLED"], pt.E[f"{what}_FAILED"]]
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
                self.echoes.append(pt.E.EXPIRED)
        elif action is pt.A.SEND_READY:
            self.announcing = True
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
            if self.armed:
                self.echoes.append(pt.E.TIMEOUT)
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


class World:
    """Everything there is."""

    def __init__(self, kind: Rendezvous, *, fallback: bool = True, max_attempts: int = 3, head: int = 0) -> None:
        self.kind = kind
        self.max_attempts = max_attempts
        self.decode = DecodeSession(fallback=fallback)
        self.rooms = KvLedger()
        self.engine_rooms: set[str] = set()
        self.alive = True
        self.room: str | None = None
        self.late: str | None = None
        self.taken_over: str | None = None
        self.exposed: dict[str, str] = {}
        self.granted: set[str] = set()
        self.clean = True
        self.running: set[str] = set()
        self.echoes: list[dt.E] = []
        self.armed = False
        self.plans: list[dt.A] = []
        self.queue = Queue()
        self.workers: dict[str, Worker] = {}
        self.network: list[tuple[str, str, dict[str, object]]] = []
        self.happen(dt.E.START)
        for _ in range(head):  # into the middle of things
            if moves := self.moves():
                self.move(*moves[0])

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
            if "import" in self.running:
                self.running.remove("import")
                self.echoes += [dt.E.IMPORTED, dt.E.IMPORT_FAILED]
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
            if self.armed:
                self.echoes.append(dt.E.TIMEOUT)
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
            self.echoes.append(dt.E.STREAM_ENDED)

    # What can happen.

    def deliver(self, index: int, *, keep: bool = False) -> None:
        what, attempt, facts = self.network[index] if keep else self.network.pop(index)
        if what in ("taken", "ready", "forged", "failed", "claimed", "claim failed", "noted"):
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
                elif what in ("ready", "forged") and worker.announcing:
                    worker.announcing = False
                    worker.happen(pt.E.NOBODY)
            return
        if what == "taken":
            self.happen(dt.E.TAKEN, attempt, rendezvous=self.kind, delivery=facts["delivery"])
        elif what == "ready":
            if worker is not None:
                worker.announcing = False
            self.happen(dt.E.READY, attempt, ended=facts["ended"])
        elif what == "forged":
            self.happen(dt.E.TICKET_REFUSED, attempt)
        elif what == "failed":
            self.happen(dt.E.FAILED, attempt, failure=facts["failure"])
        elif what == "noted":
            self.conceal(attempt)
        elif self.decode.facts.current == attempt:
            self.happen(dt.E.CLAIMED if what == "claimed" else dt.E.CLAIM_FAILED)

    def moves(self, *, resting: bool = True) -> list[tuple[str, object]]:
        """Everything that would happen by itself, sooner or later."""
        found: list[tuple[str, object]] = [("message", index) for index in range(min(4, len(self.network)))]
        if self.alive:
            found += [("decode", what) for what in sorted(self.running)]
        for worker in self.workers.values():
            if worker.alive and not (resting and worker.meets_nobody):
                found += [(worker.attempt, what) for what in sorted(worker.running)]
        if self.queue.state == "waiting":
            found.append(("take", None))
        return found

    def move(self, who: str, what: object, fate: str = "good") -> None:
        if who == "message":
            assert isinstance(what, int)
            self.deliver(what)
        elif who == "take":
            self.take()
        elif who == "decode":
            self.complete(str(what), fate)
        else:
            self.workers[who].complete(str(what), fate)

    def take(self) -> None:
        queue = self.queue
        attempt = f"a{len(self.workers)}"
        queue.tries += 1
        if queue.tries > self.max_attempts:
            queue.state, queue.dead = "gone", True
            kind = FailureKind.POISONED if queue.failed else FailureKind.ABANDONED
            self.send("failed", "", failure=kind)
            return
        queue.state, queue.owner = "taken", attempt
        worker = self.workers[attempt] = Worker(self, attempt, last=queue.tries == self.max_attempts)
        worker.happen(pt.E.START)

    def disturb(self, what: str, choose: Choose) -> None:
        """Something happens that nobody wished for."""
        self.clean = self.clean and what in HARMLESS
        alive = [worker for worker in self.workers.values() if worker.alive]
        if what == "another end":
            if moves := [move for move in self.moves(resting=False) if move[0] not in ("message", "take")]:
                who, kind = choose(moves)
                self.move(who, kind, choose(FATES))
        elif what in ("twice", "lost", "late", "forged") and self.network:
            index = choose(range(len(self.network)))
            if what == "twice":
                self.deliver(index, keep=True)
            elif what == "forged" and self.network[index][0] == "ready":
                self.network[index] = ("forged", *self.network[index][1:])
            elif what != "forged":
                message = self.network.pop(index)
                if what == "late":
                    self.network.append(message)
        elif what == "deadline":
            whose = choose([None, *(worker for worker in alive if worker.armed)])
            if whose is not None:
                whose.armed = False
                whose.happen(pt.E.TIMEOUT)
            elif self.alive and self.armed:
                self.armed = False
                self.happen(dt.E.TIMEOUT)
        elif what == "abort" and self.alive:
            self.happen(dt.E.ABORT)
        elif what == "echo":
            if self.alive and self.decode.state in (dt.S.LOCAL, dt.S.ENDED):
                echoes, self.echoes = self.echoes, []
                for echo in echoes:
                    self.happen(echo)
            for worker in alive:
                if worker.machine.over:
                    echoes, worker.echoes = worker.echoes, []
                    for echo in echoes:
                        worker.happen(echo)
        elif what == "strange" and self.kind is Rendezvous.PULL and self.granted:
            self.send("failed", choose(sorted(self.granted)), failure=choose(list(FailureKind)))
        elif what == "blind" and self.queue.state == "taken":
            self.queue.state, self.queue.owner = ("gone" if self.queue.cancelled else "waiting"), None
        elif what in ("die", "leave", "expire", "no answer") and alive:
            worker = choose(alive)
            if what == "die":
                worker.die()
            elif what == "leave":
                worker.happen(pt.E.LEAVE)
            elif what == "expire":
                worker.expire()
            elif worker.asking or worker.announcing:
                worker.asking = worker.announcing = False
                worker.happen(pt.E.NO_ANSWER)
        elif what == "decode dies":
            self.alive = self.armed = False
            self.running.clear()
            self.engine_rooms.clear()

    def check(self) -> None:
        """What holds at any time."""
        writers = [worker.room for worker in self.workers.values() if worker.writing]
        assert len(writers) == len(set(writers)), f"two write to one room: {writers}"
        self.rooms.check_integrity()
        assert len(self.plans) <= 1, f"the client gets {self.plans}"
        if self.decode.over or self.decode.state is dt.S.LOCAL:
            assert "import" not in self.running, "an import goes on for nobody"
            counts = self.rooms.counts()
            assert counts.live == counts.retired or not self.alive, "a room is held for nobody"
        for worker in self.workers.values():
            if worker.alive and worker.machine.over:
                assert worker.running == set(), f"{worker.attempt} is over and {worker.running} goes on"
                assert not worker.ledger.live, f"{worker.attempt} is over and leaves its KV to the lease"
                assert not worker.engine_holds, f"{worker.attempt} is over and its engine holds KV"
                assert self.queue.owner != worker.attempt, f"{worker.attempt} is over and keeps the task"
            worker.ledger.check_integrity()
            counts = worker.ledger.counts()
            assert counts.opened == counts.imported + counts.released + counts.expired + counts.live

    def come_to_rest(self) -> None:
        """Nothing more goes wrong; in the end everybody has let go of everything."""
        for _ in range(300):
            if moves := self.moves():
                self.move(*moves[0])
            elif self.alive and self.armed:
                assert not self.clean, f"a deadline is needed in {self.decode.state}"
                self.armed = False
                self.happen(dt.E.TIMEOUT)
            elif armed := [w for w in self.workers.values() if w.alive and w.armed]:
                assert not self.clean, f"a deadline is needed in {armed[0].machine.state}"
                armed[0].armed = False
                armed[0].happen(pt.E.TIMEOUT)
            elif held := [w for w in self.workers.values() if w.alive and w.ledger.live]:
                assert not self.clean, f"a lease's end is needed in {held[0].machine.state}"
                held[0].expire()
            elif self.alive and self.rooms.live:
                assert not self.clean, "a lease's end is needed for a room"
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


Choose = Callable[[Sequence[Any]], Any]
HARMLESS = ["another end", "twice", "late", "abort", "leave"]
DISTURBANCES = [
    "another end", "another end", "twice", "lost", "late", "forged", "deadline", "abort", "blind", "die", "leave",
    "expire", "no answer", "decode dies", "echo", "echo", "strange",
]  # fmt: skip
