"""Why a request went where it went: on the response, over HTTP, in the metrics, and on the command line."""

import asyncio
import json
import re

import msgspec
import pytest
from router_house import client

from core.cli import main
from core.components.router_messages import Routed, RoutersState

TEXT = "The quick brown fox jumps over the lazy dog, and then it does so again, and again, and again."
CHAT = {"model": "demo", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 3}
EXPLAIN = {"X-Dynamo-Explain": "1"}


def decisions_of(answer):
    return msgspec.json.decode(answer.headers["x-dynamo-decision"], type=list[Routed])


async def indexed(http):
    state = msgspec.json.decode((await http.get("/routing/state")).content, type=RoutersState)
    return sum(router.routing.indexed_blocks for router in state.routers)


async def warm(http):
    """Answers the chat once and waits until the Router knows what is cached; gives the decision."""
    answer = await http.post("/v1/chat/completions", json=CHAT, headers=EXPLAIN)
    async with asyncio.timeout(5):
        while not await indexed(http):  # noqa: ASYNC110  what is waited for has no event
            await asyncio.sleep(0.01)
    return decisions_of(answer)[0]


class TestOnTheResponse:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
    async def test_the_decision_is_there_before_the_first_byte_of_the_body(self, serve, url, path, stream):
        body = CHAT if "chat" in path else {"model": "demo", "prompt": TEXT, "max_tokens": 3}
        overrides = ("Worker.engine-args.step=0.05",)
        async with serve(*overrides) as deployment, client(url(deployment)) as http:
            async with http.stream("POST", path, json=body | {"stream": stream}, headers=EXPLAIN) as answer:
                (decision,) = decisions_of(answer)
                rest = (await answer.aread()).decode()
            assert decision.reason == "cold"
            assert decision.worker in {candidate.worker for candidate in decision.candidates}
            assert len(decision.candidates) == 3
            assert all(candidate.score is not None for candidate in decision.candidates)
            assert rest.endswith("data: [DONE]\n\n") if stream else json.loads(rest)["choices"]
            assert decision.router == deployment.replicas("Router")[0].context.instance

    async def test_it_is_there_only_when_asked_for(self, serve, url):
        async with serve() as deployment, client(url(deployment)) as http:
            for headers in ({}, {"X-Dynamo-Explain": "0"}, {"X-Dynamo-Explain": "false"}):
                answer = await http.post("/v1/chat/completions", json=CHAT, headers=headers)
                assert "x-dynamo-decision" not in answer.headers

    @pytest.mark.parametrize("stream", [False, True])
    async def test_every_choice_has_a_decision_of_its_own(self, serve, url, stream):
        async with serve() as deployment, client(url(deployment)) as http:
            answer = await http.post("/v1/chat/completions", json=CHAT | {"n": 3, "stream": stream}, headers=EXPLAIN)
            decisions = decisions_of(answer)
            assert 1 <= len(decisions) <= 3 if stream else len(decisions) == 3
            assert len({decision.request_id for decision in decisions}) == len(decisions)

    async def test_many_decisions_are_cut_to_what_a_header_can_hold(self, serve, url):
        async with serve() as deployment, client(url(deployment)) as http:
            answer = await http.post("/v1/chat/completions", json=CHAT | {"n": 100}, headers=EXPLAIN)
            text = answer.headers["x-dynamo-decision"]
            assert len(text) < 8000
            *shown, last = json.loads(text)
            assert len(shown) + last["omitted"] == 100
            assert shown

    async def test_a_graph_without_a_router_has_none(self, serve, url):
        async with serve(graph="graphs.agg") as deployment, client(url(deployment)) as http:
            answer = await http.post("/v1/chat/completions", json=CHAT, headers=EXPLAIN)
            assert answer.status_code == 200
            assert decisions_of(answer) == []
            for method, path in (("GET", "/routing/state"), ("POST", "/routing/explain")):
                refused = await http.request(method, path, json={"prompt": "x"})
                assert refused.status_code == 404
                assert "graphs.agg has no Router" in refused.json()["error"]["message"]

    async def test_an_error_stays_an_error(self, serve, url):
        async with serve() as deployment, client(url(deployment)) as http:
            answer = await http.post("/v1/chat/completions", json=CHAT | {"model": "another"}, headers=EXPLAIN)
            assert answer.status_code == 404


class TestOverHttp:
    async def test_the_state_shows_workers_load_and_index(self, serve, url):
        async with serve() as deployment, client(url(deployment)) as http:
            decision = await warm(http)
            state = msgspec.json.decode((await http.get("/routing/state")).content, type=RoutersState)
            (router,) = state.routers
            blocks = {worker.worker: worker.indexed_blocks for worker in router.routing.workers}
            assert blocks.pop(decision.worker) == decision.prompt_tokens // 16
            assert list(blocks.values()) == [0, 0]
            assert router.routing.decisions == {"cold": 1}
            assert (router.block_size, router.peers, router.refused) == (16, 0, {})
            assert router.events.snapshots >= 3

    async def test_a_prompt_is_explained_without_generating(self, serve, url):
        async with serve() as deployment, client(url(deployment)) as http:
            sent = await warm(http)
            before = await http.get("/routing/state")
            answer = await http.post("/routing/explain", json={"messages": CHAT["messages"]})
            routed = msgspec.json.decode(answer.content, type=Routed)
            assert (routed.worker, routed.reason) == (sent.worker, "hit")
            assert routed.prompt_tokens == sent.prompt_tokens
            after = await http.get("/routing/state")
            counts = [json.loads(s.content)["routers"][0]["routing"]["decisions"] for s in (before, after)]
            assert counts[0] == counts[1] == {"cold": 1}

    async def test_a_plain_prompt_is_another_one_than_a_chat(self, serve, url):
        async with serve() as deployment, client(url(deployment)) as http:
            await warm(http)
            answer = await http.post("/routing/explain", json={"prompt": TEXT})
            assert json.loads(answer.content)["reason"] == "cold"

    async def test_an_explanation_without_a_prompt_is_refused(self, serve, url):
        async with serve() as deployment, client(url(deployment)) as http:
            answer = await http.post("/routing/explain", json={})
            assert answer.status_code == 400
            assert "prompt" in answer.json()["error"]["message"]

    async def test_keys_are_asked_for(self, serve, url):
        async with serve('Frontend.api-keys=["k"]') as deployment, client(url(deployment)) as http:
            assert (await http.get("/routing/state")).status_code == 401
            assert (await http.post("/routing/explain", json={"prompt": "x"})).status_code == 401
            answer = await http.get("/routing/state", headers={"Authorization": "Bearer k"})
            assert answer.status_code == 200

    async def test_the_metrics_count_decisions_and_hits(self, serve, url):
        overrides = ("Router.ServiceArgs.workers=2",)
        async with serve(*overrides) as deployment, client(url(deployment)) as http:
            await warm(http)
            for _ in range(3):
                await http.post("/v1/chat/completions", json=CHAT)
            text = (await http.get("/metrics")).text
            counts = re.findall(r'^dynamo_router_decisions_total\{policy="kv",reason="(\w+)".*\} ([\d.]+)', text, re.M)
            assert sum(float(count) for _, count in counts) == 4
            assert {reason for reason, _ in counts} == {"cold", "hit"}
            assert float(re.search(r"^dynamo_router_hit_rate_count ([\d.]+)", text, re.M)[1]) == 4
            assert float(re.search(r"^dynamo_router_reuse_rate_count ([\d.]+)", text, re.M)[1]) == 4
            assert float(re.search(r"^dynamo_router_lookup_seconds_count ([\d.]+)", text, re.M)[1]) == 4
            assert len(re.findall(r"^dynamo_router_index_blocks\{", text, re.M)) == 2
            assert len(re.findall(r"^dynamo_router_event_lag_seconds\{", text, re.M)) == 6


class TestOnTheCommandLine:
    async def run(self, *arguments):
        return await asyncio.to_thread(main, ["route", *arguments])

    async def test_it_says_where_a_prompt_would_go(self, serve, url, capsys):
        async with serve() as deployment, client(url(deployment)) as http:
            sent = await warm(http)
            capsys.readouterr()
            assert await self.run("--explain", TEXT, "--url", url(deployment)) == 0
            out = capsys.readouterr().out
            assert out.startswith(f"{sent.worker}: it holds the most of the prompt")
            assert f"> {'':1}{sent.worker}".replace("  ", " ") in out.replace("  ", " ")
            assert await self.run("--explain", TEXT, "--completion", "--json", "--url", url(deployment)) == 0
            assert msgspec.json.decode(capsys.readouterr().out, type=Routed).reason == "cold"

    async def test_it_takes_a_conversation_from_a_file(self, serve, url, capsys, tmp_path):
        async with serve() as deployment, client(url(deployment)) as http:
            sent = await warm(http)
            for content in (CHAT, CHAT["messages"]):
                file = tmp_path / "chat.json"
                file.write_text(json.dumps(content))
                capsys.readouterr()
                assert await self.run("--messages", str(file), "--url", url(deployment)) == 0
                assert capsys.readouterr().out.startswith(f"{sent.worker}: ")

    async def test_it_shows_the_state(self, serve, url, capsys):
        async with serve() as deployment, client(url(deployment)) as http:
            await warm(http)
            capsys.readouterr()
            assert await self.run("--url", url(deployment)) == 0
            out = capsys.readouterr().out
            assert "policy kv, blocks of 16 tokens" in out
            assert "decisions: cold 1" in out
            assert all(replica.context.instance in out for replica in deployment.replicas("Worker"))

    async def test_the_deployments_own_words_are_passed_on(self, serve, url, capsys):
        async with serve(graph="graphs.agg") as deployment:
            capsys.readouterr()
            assert await self.run("--explain", "x", "--url", url(deployment)) == 1
            assert "graphs.agg has no Router" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "code", "complaint"),
        [
            (["--url", "http://127.0.0.1:9"], 1, "does not answer"),
            (["--url", "localhost:8000"], 2, "write it as http://HOST:PORT"),
            (["--completion"], 2, "belong to --explain"),
            (["--explain", "x", "--messages", "y.json"], 2, "keep one"),
            (["--messages", "/nowhere/chat.json"], 2, "cannot be read"),
        ],
    )
    async def test_mistakes_are_told_in_a_sentence(self, capsys, arguments, code, complaint):
        assert await self.run(*arguments) == code
        said = capsys.readouterr().err
        assert complaint in said
        assert said.count("\n") == 1
