"""Prefix index beside the Rust indexer of NVIDIA Dynamo (`dynamo.llm.RadixTree` of ai-dynamo-runtime), in one run.

    python -m benchmarks.router_index                      # everything, about ten minutes
    python -m benchmarks.router_index --quick              # a third of it

The peer lives in an environment of its own: `$PEER/venv` when PEER is set (as `peer` scripts make it), otherwise
`.cache/peer/venv` of this checkout, which is made on the first run. Every case runs in a process of its own, the two
sides by turns, `--rounds` times; of each figure the best round counts, since the machine's noise only ever adds.

What is compared, each side with the input that its own hashing makes:

- hash: token ids (a list) to block hashes;
- apply: encoded events to an index that has them. Ours is the router's whole path: msgpack, follower, index; the
  peer's is JSON and the tree. Normalizing an engine's events (hashing tokens, reference counts) happens in our
  workers, and is listed as `normalize`;
- find: block hashes to a dictionary of workers and their blocks. `hit` is a prompt that worker 0 holds whole and all
  others half; `miss` one that nobody holds; `stairs` one that every worker holds to another depth, the worst case of
  a search by bisection.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PEER_PACKAGE = "ai-dynamo-runtime==1.6.1"
PROMPTS = (1024, 8192, 32768, 131072)
EVENT_BLOCKS = 16
ROOT = Path(__file__).resolve().parent.parent


class Ours:
    """This project: hash_blocks, KvFollower and PrefixIndex."""

    def __init__(self, workers: int) -> None:
        sys.path.insert(0, str(ROOT))
        import msgspec

        from core.kv import BlocksPlaced, BlocksRemoved, KvFollower, KvUpdateBatch, Target, hash_blocks, root_hash
        from core.routing.index import PrefixIndex

        self.index = PrefixIndex()
        self.follower = KvFollower(self.index, ask=lambda request: None)
        for number in range(workers):
            self.follower.follow(Target(f"worker-{number}"))
        self._encode = msgspec.msgpack.Encoder().encode
        self._batch, self._placed, self._removed = KvUpdateBatch, BlocksPlaced, BlocksRemoved
        self._sequences = [0] * workers
        self._hash_blocks, self._root = hash_blocks, root_hash()

    def _event(self, worker: int, update: Any) -> bytes:
        sequence = self._sequences[worker]
        self._sequences[worker] += 1
        return self._encode(self._batch(worker=f"worker-{worker}", epoch=1, sequence=sequence, updates=[update]))

    def stored(self, worker: int, parent: int | None, blocks: list[int], names: list[int]) -> bytes:
        return self._event(worker, self._placed(blocks, parent))

    def removed(self, worker: int, blocks: list[int], names: list[int]) -> bytes:
        return self._event(worker, self._removed(blocks))

    def parent(self, block: int, name: int) -> int:
        return block

    def apply(self, worker: int, event: bytes) -> None:
        self.follower.offer_encoded(event)

    def find(self, hashes: list[int]) -> dict[Any, int]:
        return self.index.match(hashes).blocks

    def hash(self, tokens: list[int], block_size: int) -> list[int]:
        return self._hash_blocks(tokens, block_size, self._root)


class Peer:
    """ai-dynamo-runtime: compute_block_hash_for_seq and RadixTree."""

    def __init__(self, workers: int) -> None:
        from dynamo.llm import RadixTree, compute_block_hash_for_seq  # type: ignore[import-not-found]

        self._tree = RadixTree()
        self.hash: Callable[[list[int], int], list[int]] = compute_block_hash_for_seq
        self._number = 0

    def _event(self, data: dict[str, Any]) -> bytes:
        self._number += 1
        return json.dumps({"event_id": self._number, "data": data}, separators=(",", ":")).encode()

    def stored(self, worker: int, parent: int | None, blocks: list[int], names: list[int]) -> bytes:
        pairs = [{"block_hash": n, "tokens_hash": b} for b, n in zip(blocks, names, strict=True)]
        return self._event({"stored": {"parent_hash": parent, "blocks": pairs}})

    def removed(self, worker: int, blocks: list[int], names: list[int]) -> bytes:
        return self._event({"removed": {"block_hashes": names}})

    def parent(self, block: int, name: int) -> int:
        return name

    def apply(self, worker: int, event: bytes) -> None:
        self._tree.apply_event(worker, event)

    def find(self, hashes: list[int]) -> dict[Any, int]:
        scores: dict[Any, int] = self._tree.find_matches(hashes).scores
        return scores


Side = Ours | Peer


def resident_bytes() -> int:
    with Path("/proc/self/statm").open() as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def median_us(call: Callable[[], object], seconds: float) -> float:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 20:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    times.sort()
    return times[len(times) // 2] * 1e6


def measure_hash(side: Side, block_size: int, seconds: float) -> Iterator[tuple[str, float]]:
    rng = random.Random(1)
    for tokens in PROMPTS:
        prompt = [rng.randrange(32000) for _ in range(tokens)]
        yield f"hash {tokens} us", median_us(lambda p=prompt: side.hash(p, block_size), seconds)  # type: ignore[misc]


def measure_index(
    side: Side, workers: int, block_size: int, entries: int, seconds: float
) -> Iterator[tuple[str, float]]:
    rng = random.Random(5)

    def names(count: int) -> list[int]:
        return [rng.getrandbits(63) for _ in range(count)]

    longest = PROMPTS[-1] // block_size
    hot, stairs = names(longest), names(longest)
    events: list[tuple[int, bytes]] = []
    chains: list[tuple[int, list[int], list[int]]] = []
    placed = 0

    def store(worker: int, blocks: list[int], own: list[int]) -> None:
        nonlocal placed
        parent = None
        for start in range(0, len(blocks), EVENT_BLOCKS):
            run, run_names = blocks[start : start + EVENT_BLOCKS], own[start : start + EVENT_BLOCKS]
            events.append((worker, side.stored(worker, parent, run, run_names)))
            parent = side.parent(run[-1], run_names[-1])
        placed += len(blocks)

    hot_names, stair_names = names(longest), names(longest)
    half = min(longest // 2, max(1, entries // 4 // workers))
    for worker in range(workers):
        depth = longest if worker == 0 else half
        store(worker, hot[:depth], hot_names[:depth])
        depth = min(longest * (worker + 1) // workers, 2 * half * (worker + 1) // workers)
        store(worker, stairs[:depth], stair_names[:depth])
    while placed < entries:
        worker, length = rng.randrange(workers), EVENT_BLOCKS * rng.randrange(1, 9)
        chains.append((worker, names(length), names(length)))
        store(*chains[-1])

    gc.collect()
    before, start, cpu = resident_bytes(), time.perf_counter(), time.process_time()
    for worker, event in events:
        side.apply(worker, event)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - start
    gc.collect()
    yield "apply cpu us/block", cpu / placed * 1e6
    yield "apply us/block", wall / placed * 1e6
    yield "bytes/block", (resident_bytes() - before) / placed

    assert max(side.find(hot).values()) == longest, "the hot prompt is not indexed whole"
    assert len(side.find(hot)) == workers, "a worker is missing"
    for tokens in PROMPTS:
        length = tokens // block_size
        prompts = {"hit": hot[:length], "miss": names(length), "stairs": stairs[:length]}
        for kind, prompt in prompts.items():
            yield f"find {kind} {tokens} us", median_us(lambda p=prompt: side.find(p), seconds)  # type: ignore[misc]

    removals = [(w, side.removed(w, b[::-1], n[::-1])) for w, b, n in chains[: max(1, len(chains) // 10)]]
    count = sum(len(blocks) for _, blocks, _ in chains[: len(removals)])
    cpu = time.process_time()
    for worker, event in removals:
        side.apply(worker, event)
    yield "remove cpu us/block", (time.process_time() - cpu) / count * 1e6


def measure_normalize(block_size: int, blocks: int) -> Iterator[tuple[str, float]]:
    """Ours alone: engine events with tokens to numbered, encoded batches, as a worker makes them."""
    sys.path.insert(0, str(ROOT))
    import msgspec

    from core.kv import KvEventSource
    from core.messages import KvEventBatch, KvStored

    rng = random.Random(7)
    source = KvEventSource("worker-0", block_size)
    batches: list[KvEventBatch] = []
    parent, number = None, 0
    while number < blocks:
        ids = list(range(number, number + EVENT_BLOCKS))
        tokens = rng.choices(range(32000), k=block_size * EVENT_BLOCKS)
        event = KvStored(ids, parent if rng.random() < 0.75 else None, tokens, block_size)
        batches.append(KvEventBatch(len(batches), [event]))
        parent, number = ids[-1], number + EVENT_BLOCKS
    encode = msgspec.msgpack.Encoder().encode
    cpu = time.process_time()
    for batch in batches:
        for published in source.ingest(batch):
            encode(published)
    yield "normalize cpu us/block", (time.process_time() - cpu) / blocks * 1e6


def run_child(args: argparse.Namespace) -> None:
    figures: Iterator[tuple[str, float]]
    if args.case == "normalize":
        figures = measure_normalize(args.block_size, args.entries // 10)
    else:
        side = Peer(args.workers) if args.child == "peer" else Ours(args.workers)
        if args.case == "hash":
            figures = measure_hash(side, args.block_size, args.seconds)
        else:
            figures = measure_index(side, args.workers, args.block_size, args.entries, args.seconds)
    print(json.dumps(dict(figures)))


def peer_python() -> Path:
    """The interpreter that has the peer; its environment is made when it is missing."""
    home = Path(os.environ["PEER"]) if "PEER" in os.environ else ROOT / ".cache" / "peer"
    python = home / "venv" / "bin" / "python"
    if not python.exists():
        print(f"making the peer's environment in {home / 'venv'}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", home / "venv"], check=True)
    if subprocess.run([python, "-c", "import dynamo.llm"], cwd="/", capture_output=True, check=False).returncode:
        subprocess.run([python, "-m", "pip", "install", "-q", PEER_PACKAGE], check=True)
    return python


def best_of(args: argparse.Namespace, python: dict[str, Path], case: list[str]) -> dict[str, dict[str, float]]:
    best: dict[str, dict[str, float]] = {side: {} for side in python}
    for _ in range(args.rounds):
        for side, interpreter in python.items():
            command = [str(interpreter), __file__, "--child", side, "--entries", str(args.entries), *case]
            command += ["--seconds", str(args.seconds)]
            # The repository has a package `dynamo` too: the peer must not find it.
            environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
            done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{side} failed: {done.stderr}")
            for name, value in json.loads(done.stdout).items():
                best[side][name] = min(value, best[side].get(name, float("inf")))
    return best


def compare(args: argparse.Namespace) -> None:
    python = {"peer": peer_python(), "ours": Path(sys.executable)}
    print(f"{'case':<26} {'figure':<26} {'peer':>10} {'ours':>10} {'ours/peer':>10}")
    missed = []
    for block_size in (16, 64):
        cases = [("hash", 1)] + [("index", workers) for workers in args.workers_list]
        for kind, workers in cases:
            case = ["--case", kind, "--workers", str(workers), "--block-size", str(block_size)]
            best = best_of(args, python, case)
            label = f"block {block_size}" + (f", {workers} workers" if kind == "index" else "")
            for name, ours in best["ours"].items():
                peer = best["peer"][name]
                print(f"{label:<26} {name:<26} {peer:>10.3f} {ours:>10.3f} {ours / peer:>10.2f}", flush=True)
                tokens = int(name.split()[-2]) if name.startswith(("hash", "find")) else 0
                limit = {"hash": 2.0, "find": 1.0, "appl": 2.0}.get(name[:4])
                if (
                    limit is not None
                    and "stairs" not in name
                    and (tokens >= 8192 or not tokens)
                    and ours > limit * peer
                ):
                    missed.append(f"{label}: {name} is {ours / peer:.2f} times the peer's; the goal is {limit}")
        best = best_of(args, {"ours": python["ours"]}, ["--case", "normalize", "--block-size", str(block_size)])
        for name, ours in best["ours"].items():
            print(f"{'block ' + str(block_size):<26} {name:<26} {'':>10} {ours:>10.3f}", flush=True)
    print("\n".join(missed) if missed else "every goal is met")
    sys.exit(1 if missed else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000, help="(block, worker) pairs in the index")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each median")
    parser.add_argument("--quick", action="store_true", help="one round, 2 and 256 workers")
    parser.add_argument("--child", choices=("peer", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--case", default="index", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=16, help=argparse.SUPPRESS)
    parser.add_argument("--block-size", type=int, default=16, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.workers_list = (2, 256) if args.quick else (2, 16, 64, 256)
    args.rounds = 1 if args.quick else args.rounds
    if args.child:
        run_child(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
