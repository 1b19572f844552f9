"""The command line on the disaggregated graphs."""

import asyncio
import json

import pytest

from core.cli import main
from tests.components.disagg_house import DisaggHouse


def test_the_graphs_are_drawn(here):
    drawn = here("graph", "graphs.disagg").stdout
    assert "Worker  [generate, feed, prefill_state]" in drawn
    assert drawn.index("Frontend") < drawn.index("Processor") < drawn.index("Worker  [") < drawn.index("PrefillWorker")
    assert "Worker --> PrefillWorker" in here("graph", "graphs.disagg_router", "--mermaid").stdout


def test_the_keys_are_listed_with_their_meaning(here):
    keys = here("graph", "graphs.disagg", "--keys").stdout
    assert "prefill-timeout: a number above 0; default 60.0\n      For the prefill." in keys


def test_the_engines_say_which_modes_they_serve(here):
    engines = json.loads(here("engines", "--json").stdout)["engines"]
    modes = {engine["name"]: engine["modes"] for engine in engines}
    assert modes["torch"] == ["agg", "agg_router", "disagg", "disagg_router"]
    assert modes["puppet"] == ["agg", "agg_router"]


@pytest.mark.parametrize("mode", ["disagg", "disagg_router"])
def test_the_shipped_configurations_fit(here, mode):
    done = here("serve", f"graphs.{mode}", "-f", f"configs/{mode}.yaml", "--dry-run=json")
    assert done.returncode == 0, done.stderr


def test_an_engine_without_the_roles_is_refused_with_exit_code_2(here):
    done = here("serve", "graphs.disagg", "--engine", "puppet", "--port", "0")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "Error: Engine 'puppet' cannot be a prefill worker; it serves as aggregated. "
        "Choose another graph or another engine."
    )


class TestConfig:
    async def test_settings_are_shown_changed_and_reset(self, capsys):
        async with DisaggHouse() as house:

            async def dynamo(*arguments):
                code = await asyncio.to_thread(main, ["config", *arguments, "--url", house.url])
                return code, *capsys.readouterr()

            code, out, _ = await dynamo("get")
            assert (code, out.splitlines()[2]) == (0, "conditional-disagg            false")
            code, out, _ = await dynamo("set", "conditional_disagg=true", "max-local-prefill-length=7")
            assert (code, out.splitlines()) == (
                0,
                [
                    "conditional-disagg        true   changed, configured is false",
                    "max-local-prefill-length  7   changed, configured is 1000",
                ],
            )
            await house.text(list(range(20, 27)))
            assert (await house.state())["workers"][0]["decisions"] == {"short": 1}
            code, out, _ = await dynamo("reset", "conditional-disagg", "--json")
            assert (code, json.loads(out)) == (0, {"conditional-disagg": False})
            code, out, _ = await dynamo("get", "max-local-prefill-length")
            assert "7   changed" in out
            code, out, _ = await dynamo("reset")
            assert "changed" not in out

    @pytest.mark.parametrize(
        ("arguments", "sentence", "code"),
        [
            (["set", "max-local-prefill-length=-1"], "max-local-prefill-length is -1; it must be at least 0.", 1),
            (["set", "kv-lease=3"], "'kv-lease' cannot be changed while serving", 1),
            (["set", "conditional-disagg"], "'conditional-disagg' is no change; write KEY=VALUE.", 2),
            (["get", "port"], "'port' is no such setting; there are enable-disaggregated-prefill", 2),
        ],
    )
    async def test_mistakes_end_in_a_sentence(self, capsys, arguments, sentence, code):
        async with DisaggHouse() as house:
            found = await asyncio.to_thread(main, ["config", *arguments, "--url", house.url])
            _, err = capsys.readouterr()
            assert (found, sentence in err) == (code, True), err

    def test_nobody_there(self, here):
        done = here("config", "get", "--url", "http://127.0.0.1:1")
        assert done.returncode == 1
        assert "Is the deployment running?" in done.stderr
