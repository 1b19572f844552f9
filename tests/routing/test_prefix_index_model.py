"""Engine events through normalizer, stream and index, against a model that knows nothing of trees, bits and bisection.

The model keeps, for every worker, how often each path of token blocks is stored on each medium. A prompt's hit is found
by walking it block by block.
"""

from collections import Counter, defaultdict

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from core.kv import KvEventSource, KvFollower, Target, prompt_hashes
from core.messages import KvCleared, KvEventBatch, KvRemoved, KvStored, Medium
from core.routing.index import PrefixIndex

BLOCK = 2
MEDIA = list(Medium)
WORKERS = ["a", "b", "c"]
# Few tokens and short chains, so that paths of different workers meet all the time.
SUFFIX = st.lists(st.integers(0, 1), min_size=1, max_size=4)
MEDIUM = st.sampled_from([Medium.DEVICE] * 3 + MEDIA)
WORKER = st.sampled_from(WORKERS)


def engine_hash(path):
    """An id that means nothing to anybody else, negative for half of the paths."""
    return hash(path) if len(path) % 2 else hash(path) % 2**64


class IndexMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.index = PrefixIndex()
        self.sources = {}
        self.numbers = {}
        self.stored = defaultdict(Counter)  # worker to (path, medium) to times
        self.follower = KvFollower(self.index, ask=self.answer)
        for worker in WORKERS:
            self.start(worker)
        self.epoch = 100

    def start(self, worker, epoch=1):
        self.sources[worker] = KvEventSource(worker, BLOCK, epoch=epoch)
        self.numbers[worker] = 0
        self.stored[worker] = Counter()
        self.follower.follow(Target(worker))

    def answer(self, request):
        for message in self.sources[request.worker].answer(request):
            self.follower.offer(message)

    def send(self, worker, *events):
        batch = KvEventBatch(self.numbers[worker], list(events))
        self.numbers[worker] += 1
        for published in self.sources[worker].ingest(batch):
            self.follower.offer(published)

    def known(self, worker):
        return sorted({path for path, _ in self.stored[worker]})

    def store_event(self, worker, parent, suffix, medium):
        paths = [(*parent, *suffix[:n]) for n in range(1, len(suffix) + 1)]
        for path in paths:
            self.stored[worker][path, medium] += 1
        return KvStored(
            [engine_hash(path) for path in paths],
            engine_hash(parent) if parent else None,
            [token for name in suffix for token in (name, name)],
            BLOCK,
            medium,
        )

    def remove_event(self, worker, path, medium):
        self.stored[worker][path, medium] -= 1
        if not self.stored[worker][path, medium]:
            del self.stored[worker][path, medium]
        return KvRemoved([engine_hash(path)], medium)

    @rule(worker=WORKER, suffix=SUFFIX, medium=MEDIUM, data=st.data())
    def store(self, worker, suffix, medium, data):
        parent = data.draw(st.sampled_from([(), *self.known(worker)]))
        self.send(worker, self.store_event(worker, parent, suffix, medium))

    @rule(worker=WORKER, data=st.data())
    def remove(self, worker, data):
        """In any order: leaves, beginnings and what lies between, several in one batch."""
        events = []
        for _ in range(data.draw(st.integers(1, 3))):
            held = sorted(self.stored[worker], key=str)
            if held:
                events.append(self.remove_event(worker, *data.draw(st.sampled_from(held))))
        self.send(worker, *events)

    @rule(worker=WORKER, suffix=SUFFIX, medium=MEDIUM, data=st.data())
    def move(self, worker, suffix, medium, data):
        """Off one medium and onto another in one batch."""
        held = sorted(self.stored[worker], key=str)
        if held:
            path, before = data.draw(st.sampled_from(held))
            parent = path[:-1]
            if parent and parent not in self.known(worker):
                return
            stored = self.store_event(worker, parent, path[-1:], medium)
            self.send(worker, stored, self.remove_event(worker, path, before))

    @rule(worker=WORKER)
    def clear(self, worker):
        self.stored[worker] = Counter()
        self.send(worker, KvCleared())

    @rule(worker=WORKER)
    def lose_a_batch(self, worker):
        """A stored block that the router does not hear of before the next heartbeat."""
        for _ in range(2):
            batch = KvEventBatch(self.numbers[worker], [self.store_event(worker, (), [1], Medium.DEVICE)])
            self.numbers[worker] += 1
            self.sources[worker].ingest(batch)
        self.follower.offer(self.sources[worker].heartbeat())

    @rule(worker=WORKER)
    def restart_worker(self, worker):
        self.epoch += 1
        self.start(worker, self.epoch)
        self.follower.offer(self.sources[worker].heartbeat())

    @rule(worker=WORKER)
    def leave_and_return(self, worker):
        self.follower.unfollow(Target(worker))
        assert Target(worker) not in self.index.match(prompt_hashes([0, 0], BLOCK)).blocks
        self.follower.follow(Target(worker))

    @rule()
    def restart_router(self):
        """Everything known comes from the workers' snapshots."""
        self.index = PrefixIndex()
        self.follower = KvFollower(self.index, ask=self.answer)
        for worker in WORKERS:
            self.follower.follow(Target(worker))

    @rule(blocks=st.integers(1, 20))
    def sweep(self, blocks):
        self.index.sweep(blocks)

    @rule(names=st.lists(st.integers(0, 1), max_size=9))
    def look_up(self, names):
        expected, slower = {}, {}
        for worker in WORKERS:
            levels = []
            for end in range(1, len(names) + 1):
                held = [MEDIA.index(m) for p, m in self.stored[worker] if p == tuple(names[:end])]
                if not held:
                    break
                levels.append(max(min(held), levels[-1] if levels else 0))
            if levels:
                expected[Target(worker)] = len(levels)
            for level in set(levels) - {0}:
                slower.setdefault(MEDIA[level], {})[Target(worker)] = levels.count(level)
        found = self.index.match(prompt_hashes([token for name in names for token in (name, name)], BLOCK))
        assert found.blocks == expected
        assert found.slower == slower

    @invariant()
    def everything_is_whole(self):
        self.index.check_integrity()
        self.follower.check_integrity()
        for source in self.sources.values():
            source.check_integrity()


IndexMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestIndexAgainstModel = IndexMachine.TestCase
