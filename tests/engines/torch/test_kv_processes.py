"""KV from an engine of another process: fetched, and refused when that process hangs or dies."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from core.kv.ticket import decode_ticket
from core.messages import EngineConfig, EngineError, EngineRequest, KvTicket, Role
from dynamo.testing.run import Stream
from dynamo.testing.target import Target
from tests.engines.torch.conftest import prompt_of, until
from tests.engines.torch.kv_pairs import ask, make_target

ROOT = Path(__file__).parents[3]
SECRET = "a secret that two processes share"


class Prefiller:
    """The other process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def ticket(self, request: EngineRequest) -> KvTicket:
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(request) + b"\n")
        return decode_ticket(base64.b64decode(await self.line()))

    @property
    def state(self) -> str:
        """One letter, as the kernel has it; X when the process is gone."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        return stat.read_text().rpartition(")")[2].split()[0] if stat.exists() else "X"

    async def line(self) -> bytes:
        assert self.process.stdout is not None
        return await asyncio.wait_for(self.process.stdout.readline(), 60)


@contextlib.asynccontextmanager
async def prefiller(folder: Path, transport: str) -> AsyncIterator[Prefiller]:
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cpu",
        num_kv_blocks=64,
        max_model_len=512,
        engine_args={"threads": 1},
        worker_id="elsewhere",
        kv_secret=SECRET,
        kv_checksum=True,
        kv_transfer=transport,  # type: ignore[arg-type]
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.engines.torch.kv_prefiller",
        msgspec.json.encode(config).decode(),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    other = Prefiller(process)
    try:
        assert await other.line() == b"ready\n"
        yield other
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.mark.parametrize("transport", ["tcp", "auto"])
async def test_kv_of_another_process(transport: str, llama: Path) -> None:
    """It is fetched. From a process that hangs it is right or refused in time, from one that has died it is refused;
    and no block of ours is lost.
    """
    prompt = prompt_of(100)
    async with (
        prefiller(llama, transport) as other,
        make_target(llama, Role.DECODE, kv_secret=SECRET, kv_transfer=transport, block_size=16) as target,
    ):
        expected = (await target.complete(ask(prompt, 8))).tokens
        request = ask(prompt, 8, name="fetched", cache_salt="fetched")
        ticket = await other.ticket(request)
        assert await fetch(target, request, ticket) == expected

        for signal_, name in ((signal.SIGSTOP, "hangs"), (signal.SIGKILL, "died")):
            request = ask(prompt, 8, name=name, cache_salt=name)
            ticket = await other.ticket(request)
            other.process.send_signal(signal_)
            await until(lambda: other.state in "TZX")
            try:
                found = await fetch(target, request, ticket, seconds=1.5)
            except EngineError as error:
                assert error.retryable  # noqa: PT017 - it need not come
            else:
                # Memory of a process that stands still can be read without its help, and holds what it held.
                assert signal_ is signal.SIGSTOP
                assert transport == "auto"
                assert found == expected
            if signal_ is signal.SIGSTOP:
                other.process.send_signal(signal.SIGCONT)
        await target.until_idle()
        await target.check_integrity()
        assert (await target.complete(ask(prompt, 8))).tokens == expected


async def test_another_secret(llama: Path) -> None:
    """KV is handed to nobody who does not know the deployment's secret."""
    async with (
        prefiller(llama, "tcp") as other,
        make_target(llama, Role.DECODE, kv_secret="another secret altogether", kv_transfer="tcp") as target,
    ):
        request = ask(prompt_of(40), 8)
        with pytest.raises(EngineError):
            await fetch(target, request, await other.ticket(request), seconds=3)
        await target.until_idle()


async def fetch(target: Target, request: EngineRequest, ticket: KvTicket, *, seconds: float = 20) -> list[int]:
    """The tokens behind the KV; whatever happens, nothing is held afterwards."""
    room = await target.host.reserve_kv(request)
    try:
        await target.host.import_kv(msgspec.structs.replace(ticket, expires_in=seconds), room.session)
        async with Stream(target.host, request, 20, room.session) as stream:
            return (await stream.finish()).tokens
    finally:
        await target.host.release_kv(room.session)
