"""Metrics and the access log, as an operator reads them."""

from __future__ import annotations

import itertools
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from core.messages import Load
from core.observe import AccessLog, LoopHistogram, Metrics

BOUNDS = (0.1, 0.5, 1.0)


@given(values=st.lists(st.floats(0, 3) | st.sampled_from(BOUNDS), max_size=50))
def test_a_loop_histogram_is_an_ordinary_one(values: list[float]):
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = LoopHistogram("h", "text", BOUNDS)
    ours.register(mine)
    reference = Histogram("h", "text", buckets=BOUNDS, registry=theirs)
    for value in values:
        mine.observe(value)
        reference.observe(value)
    wanted = [line for line in generate_latest(theirs).splitlines() if b"_created" not in line]
    assert [line for line in generate_latest(ours).splitlines() if b"_created" not in line] == wanted
    assert mine.count == len(values)


@given(times=st.lists(st.integers(0, 1000), min_size=1, max_size=20).map(sorted))
def test_gaps_are_observed_all_at_once(times: list[int]):
    whole, single = LoopHistogram("h", "text", (1, 10)), LoopHistogram("h", "text", (1, 10))
    whole.observe_gaps(times)
    for before, after in itertools.pairwise(times):
        single.observe(after - before)
    assert list(whole.collect()) == list(single.collect())


@pytest.mark.parametrize("bounds", [(), (2, 1), (1, 1)])
def test_buckets_that_do_not_ascend_are_refused(bounds: tuple[float, ...]):
    with pytest.raises(ValueError, match="ascend"):
        LoopHistogram("h", "text", bounds)


def samples(metrics: Metrics) -> dict[str, float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {f"{s.name}{sorted(s.labels.items())}": s.value for family in families for s in family.samples}


def test_requests_tokens_and_choices():
    metrics = Metrics()
    for status in (200, 200, 400):
        metrics.request("/v1/completions", status)
    metrics.tokens(10, 0, 3)
    metrics.tokens(5, 4, 1)
    metrics.finished("stop")
    seen = samples(metrics)
    assert seen["dynamo_requests_total[('endpoint', '/v1/completions'), ('status', '200')]"] == 2
    assert seen["dynamo_prompt_tokens_total[]"] == 15
    assert seen["dynamo_cached_tokens_total[]"] == 4
    assert seen["dynamo_output_tokens_total[]"] == 4
    assert seen["dynamo_choices_total[('finish', 'stop')]"] == 1


def load(**figures: int) -> Load:
    return Load(**{"running": 0, "waiting": 0, "kv_blocks_used": 0, "kv_blocks_total": 4, **figures})


def test_engine_loads_are_read_at_scrape():
    metrics = Metrics()
    loads = [load(running=1, waiting=2), load(running=6, data_parallel_rank=1)]
    metrics.add_engine("worker-0", lambda: loads)
    seen = samples(metrics)
    assert seen["dynamo_engine_waiting[('rank', '0'), ('worker', 'worker-0')]"] == 2
    assert seen["dynamo_engine_running[('rank', '1'), ('worker', 'worker-0')]"] == 6
    loads[0] = load(running=9)
    assert samples(metrics)["dynamo_engine_running[('rank', '0'), ('worker', 'worker-0')]"] == 9
    metrics.remove_engine("worker-0")
    metrics.remove_engine("worker-0")
    assert not [name for name in samples(metrics) if "worker-0" in name]


def test_two_processes_in_one_do_not_share(caplog: pytest.LogCaptureFixture):
    one, other = Metrics(), Metrics()
    one.tokens(1, 0, 1)
    assert samples(other)["dynamo_prompt_tokens_total[]"] == 0


def test_the_access_log_is_one_json_line_a_request(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="dynamo.access"):
        AccessLog(enabled=True).write("id-1", "127.0.0.1:5", "POST", "/v1/completions", 200, 0.01234, None, 3, 99)
        AccessLog(enabled=False).write("id-2", "", "GET", "/live", 200, 0, None, 1, 1)
    (record,) = caplog.records
    assert json.loads(record.getMessage()) == {
        "id": "id-1", "client": "127.0.0.1:5", "method": "POST", "path": "/v1/completions", "status": 200, "ms": 12.34,
        "first_ms": None, "pieces": 3, "bytes": 99,
    }  # fmt: skip
