"""Runs `python -m dynamo` as a user does, with the puppet engine installed beside the real ones."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from core.cli import main

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "tests" / "components" / "plugin"


def environment(**more):
    path = os.pathsep.join([str(PLUGIN), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **more}


@pytest.fixture
def dynamo(tmp_path):
    """`dynamo("engines", "--json")` gives the finished process; runs in an empty directory."""

    def run(*arguments, **env):
        return subprocess.run(
            [sys.executable, "-m", "dynamo", *arguments],
            capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment(**env),
        )  # fmt: skip

    run.folder = tmp_path
    return run


@pytest.fixture
def user_environment():
    """Builds the environment variables of a user's process."""
    return environment


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """As `dynamo`, in this process, which is much faster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(PLUGIN), str(ROOT), *sys.path])
    monkeypatch.delenv("DYN_DEPLOYMENT_CONFIG", raising=False)

    def run(*arguments, **env):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        code = main(arguments)
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, out, err)

    run.folder = tmp_path
    return run


class Served:
    """A running `dynamo serve`."""

    def __init__(self, process):
        self.process = process
        self.lines = []
        self._readers = [
            threading.Thread(target=self._read, args=(stream,), daemon=True)
            for stream in (process.stdout, process.stderr)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream):
        for line in stream:
            self.lines.append(line.rstrip("\n"))

    @property
    def text(self):
        return "\n".join(self.lines)

    def wait_for(self, pattern, seconds=30):
        """The first match in what was printed. Fails when the process ends, or the time is over, without it."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found = re.search(pattern, self.text)
            if found:
                return found
            if self.process.poll() is not None:
                self._readers[0].join(2)
                self._readers[1].join(2)
                found = re.search(pattern, self.text)
                if found:
                    return found
                break
            time.sleep(0.01)
        raise AssertionError(f"no {pattern!r} in:\n{self.text}")

    @property
    def url(self):
        return self.wait_for(r"Serving \S+ at (http://\S+)/v1")[1]

    def signal(self, number=signal.SIGINT):
        self.process.send_signal(number)

    def end(self, seconds=15):
        """The exit code."""
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(5)
        return code


@pytest.fixture
def serve(tmp_path):
    """`serve("--Worker.model=x")` starts graphs.agg on the puppet engine and a free port."""
    running = []

    def start(*arguments, graph="graphs.agg", engine="puppet"):
        process = subprocess.Popen(
            [sys.executable, "-m", "dynamo", "serve", graph, "--engine", engine, "--port", "0", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment(),
        )  # fmt: skip
        served = Served(process)
        running.append(served)
        return served

    yield start
    for served in running:
        if served.process.poll() is None:
            served.process.kill()
        served.end()
        served.process.stdout.close()
        served.process.stderr.close()
