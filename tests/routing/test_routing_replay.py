"""The replay benchmark on conversations made here: what it must show whatever the machine."""

import json
import random
import subprocess
import sys

import pytest

from benchmarks.routing_replay import Replay, read_trace, reuse_bound
from core.kv import Target
from core.routing import RouterConfig


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """40 conversations of 6 turns, 1,024 tokens more each turn, all at once over a minute."""
    rng = random.Random(3)
    rows, names = [], iter(range(1, 10**6))
    for _ in range(40):
        blocks, moment = [0], rng.uniform(0, 20_000)
        for _ in range(6):
            blocks = [*blocks, next(names), next(names)]
            rows.append(
                {
                    "timestamp": moment,
                    "input_length": 512 * len(blocks) - rng.randrange(200),
                    "output_length": rng.randrange(20, 200),
                    "hash_ids": blocks,
                }
            )
            moment += rng.uniform(4_000, 8_000)
    path = tmp_path_factory.mktemp("trace") / "conversations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda row: row["timestamp"])))
    return path


def replay(trace, workers=8, blocks=2000, **settings):
    config = RouterConfig(**{"router_seed": 1, **settings})
    replayed = Replay(read_trace(trace, None, 1.0), config, workers, blocks)
    result = replayed.run()
    for worker in replayed.workers.values():
        assert worker.cache.private == 0
        assert not worker.cache.users
        assert len(worker.cache.free) <= blocks
        if config.router_events:
            held = replayed.selector.index.blocks_of(Target(worker.name))
            assert held == len(worker.cache.free), "the index knows other blocks than the cache holds"
    return result


def test_kv_reuses_more_and_answers_sooner_than_round_robin(trace):
    kv, turns = replay(trace), replay(trace, router="round-robin")
    assert kv.reuse > 2 * turns.reuse
    assert kv.reuse > 0.9 * reuse_bound(read_trace(trace, None, 1.0))
    assert kv.quantile(0.9) < turns.quantile(0.9)


def test_without_events_conversations_still_find_their_worker(trace):
    assert replay(trace, router_events=False).reuse > 2 * replay(trace, router="random").reuse


def test_a_replay_repeats_itself(trace):
    assert replay(trace).ttft == replay(trace).ttft


def test_small_caches_evict_and_the_index_follows(trace):
    assert replay(trace, blocks=400).reuse < replay(trace).reuse


def test_the_command_prints_a_row_a_policy_and_needs_a_trace(trace):
    command = [sys.executable, "-m", "benchmarks.routing_replay", "--workers", "2", "--scale", "1"]
    done = subprocess.run([*command, "--trace", str(trace)], capture_output=True, text=True, check=False)
    assert [line.split()[2] for line in done.stdout.splitlines()[1:]] == [
        "kv",
        "round-robin",
        "least-loaded",
        "pure-hit",
    ]
    done = subprocess.run([*command, "--trace", "nowhere.jsonl"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no trace at nowhere.jsonl" in done.stderr
