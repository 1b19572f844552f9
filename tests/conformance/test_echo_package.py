"""The echo engine as its users meet it: installed by pip into a fresh environment, listed, served, tried.

Needs a package index that pip can reach; everything else is made from this checkout.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
DEADLINE = 60.0
"""Seconds for a command, or for a server to be ready."""


class Environment:
    """A virtual environment with the project's wheel, the echo plug-in and pytest, and an empty folder to work in."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.home.mkdir()
        self._bin = folder / "venv/bin"
        here = [sys.executable, "-m"]
        _run([*here, "venv", "--without-pip", str(folder / "venv")])
        quiet = ["--quiet", "--disable-pip-version-check"]
        _run([*here, "pip", "wheel", *quiet, "--no-deps", "--wheel-dir", str(folder), str(ROOT)])
        (wheel,) = folder.glob("dynamo_serve-*.whl")
        # The plug-in is built from a copy, so that building leaves nothing in the checkout.
        plugin = shutil.copytree(ROOT / "examples/echo-engine", folder / "echo-engine")
        into = [*here, "pip", "--python", str(self._bin / "python"), "install", *quiet]
        _run([*into, "--constraint", str(ROOT / "constraints.txt"), str(wheel), str(plugin), "pytest"])
        self.plugin_tests = plugin / "test_echo_engine.py"

    def start(self, *command: str) -> subprocess.Popen[str]:
        """A command of the environment, running."""
        outside = {"PYTHONPATH", "VIRTUAL_ENV", "MODEL"}
        environment = {name: value for name, value in os.environ.items() if name not in outside}
        program = [str(self._bin / command[0]), *command[1:]]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            program, cwd=self.home, env=environment, text=True, stdout=pipe, stderr=subprocess.STDOUT
        )

    def run(self, *command: str) -> str:
        """What a command prints. Raises `AssertionError` when it fails."""
        process = self.start(*command)
        try:
            output, _ = process.communicate(timeout=DEADLINE)
        finally:
            process.kill()
        assert process.returncode == 0, output
        return output


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Made once; takes about twenty seconds."""
    return Environment(tmp_path_factory.mktemp("echo-package"))


@pytest.fixture
def server(environment: Environment) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The echo engine behind HTTP, on the model that is shipped in the wheel."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = environment.start("dynamo", "serve", "--engine", "echo", "graphs.agg", "--port", str(port))
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.communicate()


def test_there_is_no_torch(environment: Environment):
    """The core and a plug-in need no torch, nor anything of it."""
    environment.run("python", "-c", "import importlib.util as u; assert not u.find_spec('torch')")


def test_is_listed(environment: Environment):
    """`dynamo engines` lists the plug-in beside the built-in engines, and why one of those cannot run here."""
    engines = {
        engine["name"]: engine for engine in json.loads(environment.run("dynamo", "engines", "--json"))["engines"]
    }
    echo, torch = engines["echo"], engines["torch"]
    assert echo["available"]
    assert echo["plugin"] == "dynamo-echo-engine"
    assert not torch["available"]
    assert "pip install" in torch["unavailable"]


def test_serves_over_http(server: tuple[str, subprocess.Popen[str]]):
    """`dynamo serve --engine echo graphs.agg` answers OpenAI's interface, and Ctrl-C ends it with code 0."""
    url, process = server
    _until_ready(url, process)
    body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=DEADLINE).raise_for_status().json()
    assert answer["choices"][0]["text"].startswith("Once upon a time")
    assert answer["usage"]["completion_tokens"] == 8
    chat = {"model": "demo", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 40, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=chat, timeout=DEADLINE) as stream:
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    deltas = [choice["delta"] for line in lines[:-1] for choice in json.loads(line)["choices"]]
    assert "Hello!" in "".join(delta.get("content") or "" for delta in deltas)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, output
    assert "Traceback" not in output


def test_undeclared_is_refused_over_http(server: tuple[str, subprocess.Popen[str]]):
    """What the engine does not declare is refused with 400 and a sentence, not ignored."""
    url, process = server
    _until_ready(url, process)
    body = {"model": "demo", "prompt": "Once", "max_tokens": 2, "presence_penalty": 1.0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=DEADLINE)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "presence_penalty"
    assert "Engine 'echo' does not support 'presence_penalty'" in error["message"]


def test_kit(environment: Environment):
    """The plug-in's own test, which is the conformance kit, passes with plain pytest where it is installed."""
    find = "from core.resources import shipped; print(shipped('models/demo'))"
    folder = environment.run("python", "-c", find).strip()
    options = ["-q", "-W", "error", "-p", "no:cacheprovider", str(environment.plugin_tests)]
    output = environment.run("python", "-c", _KIT, folder, *options)
    assert " passed" in output
    assert "failed" not in output


_KIT = """
import os, sys, pytest
os.environ["MODEL"] = sys.argv[1]
sys.exit(pytest.main(sys.argv[2:]))
"""


def _until_ready(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE
    while True:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"the server was not ready within {DEADLINE:g} s"
        try:
            if httpx.get(f"{url}/health", timeout=DEADLINE).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
