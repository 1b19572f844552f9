"""A served graph from its banner to its exit code."""

import json
import shlex
import signal
import subprocess
import threading
import time

import httpx
import pytest

LONG = {"model": "demo", "prompt": "x", "max_tokens": 100, "stream": True}
SLOW = "--Worker.engine-args.step=0.02"


class Stream:
    """One streaming request in a thread of its own: what came, and how it ended."""

    def __init__(self, url, body=None):
        self.lines, self.error = [], None
        self.began = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(url, body or LONG), daemon=True)
        self._thread.start()

    def _run(self, url, body):
        try:
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
                for line in answer.iter_lines():
                    if line:
                        self.lines.append(line)
                        self.began.set()
        except httpx.HTTPError as error:
            self.error = error
        finally:
            self.began.set()

    def end(self, seconds=15):
        self._thread.join(seconds)
        assert not self._thread.is_alive()
        return self


def accepts(url):
    """Whether a new connection is taken."""
    try:
        httpx.get(f"{url}/health")
    except httpx.ConnectError:
        return False
    return True


def test_the_banner_has_a_command_that_works(serve):
    served = serve()
    served.wait_for("Ctrl-C")
    command = served.wait_for(r"  (curl -N .*?\\\n.*?)\n")[1].replace("\\\n", " ")
    body = json.loads(shlex.split(command)[-1]) | {"max_tokens": 3}
    arguments = [*shlex.split(command)[:-1], json.dumps(body)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=20)
    assert done.stdout.strip().endswith("data: [DONE]"), done.stderr
    served.signal()
    assert served.end() == 0
    assert "Worker-0: starting puppet with demo" in served.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_finishes_what_runs_and_the_exit_code_is_zero(serve, number):
    served = serve(SLOW)
    stream = Stream(served.url)
    assert stream.began.wait(10)
    served.signal(number)
    served.wait_for("Finishing 1 running request; press Ctrl-C again to stop at once.")
    assert stream.end().error is None
    assert stream.lines[-1] == "data: [DONE]"
    assert len(stream.lines) > 50
    assert served.end() == 0
    assert served.lines[-1] == "Stopped."


def test_no_new_requests_are_taken_while_draining(serve):
    served = serve(SLOW)
    url = served.url
    stream = Stream(url)
    assert stream.began.wait(10)
    served.signal()
    served.wait_for("Finishing 1 running")
    until = time.monotonic() + 5
    while accepts(url):
        assert time.monotonic() < until
    assert stream.lines[-1] != "data: [DONE]"
    assert stream.end().lines[-1] == "data: [DONE]"
    assert served.end() == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_signal_stops_at_once(serve, number, code):
    served = serve("--Worker.engine-args.step=0.5")
    stream = Stream(served.url)
    assert stream.began.wait(10)
    served.signal(number)
    served.wait_for("Finishing 1 running")
    served.signal(number)
    assert served.end(seconds=8) == code
    assert stream.end().lines[-1:] != ["data: [DONE]"] or "error" in stream.lines[-2]


def test_requests_that_outlast_the_drain_are_cut_off_and_the_exit_code_says_so(serve):
    served = serve("--Worker.engine-args.step=0.5", "--drain-timeout", "0.2")
    stream = Stream(served.url)
    assert stream.began.wait(10)
    served.signal()
    assert served.end() == 1
    assert "Not finished within 0.2 s and cut off: 1 running request." in served.text
    stream.end()


def test_a_signal_while_loading_ends_it(serve):
    served = serve("--Worker.engine-args.start_seconds=30")
    served.wait_for("starting puppet")
    served.signal()
    assert served.end(seconds=8) == 130
    assert "Interrupted before everything was up." in served.text


def test_a_deployment_without_workers_ends_with_an_error(serve, tmp_path):
    served = serve(
        f"--Worker.engine-args.starts={tmp_path / 'starts'}",
        "--Worker.engine-args.max_starts=1",
        "--Worker.ServiceArgs.max-restarts=1",
    )
    body = {"model": "demo", "prompt": [13, 13], "max_tokens": 5, "stream": True}
    stream = Stream(served.url, body).end()
    assert "error" in "".join(stream.lines)
    assert served.end(seconds=20) == 1
    assert "Error: Worker has no replica left: the puppet's strings were cut" in served.text
    assert "restarting" in served.text


def test_two_workers_are_shown_and_serve(serve):
    served = serve("--Worker.ServiceArgs.workers=2")
    url = served.url
    text = httpx.get(f"{url}/metrics").text
    assert text.count("dynamo_engine_running{") == 2
    served.signal()
    assert served.end() == 0
