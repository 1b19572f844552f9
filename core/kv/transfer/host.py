"""What two processes can find out about each other's whereabouts: one process, one host, reachable memory."""

from __future__ import annotations

import ctypes
import os
import secrets
from collections.abc import Callable
from functools import cache
from pathlib import Path

import msgspec

PROCESS = secrets.token_hex(16)
"""This process, among all there are and were. A fork shares it, but no transfer endpoint survives a fork."""

_MARK_BYTES = 16


class Whereabouts(msgspec.Struct, frozen=True):
    """Where an endpoint lives, for others to compare with their own place."""

    process: str
    boot: str
    """The host's boot id: equal on one running kernel."""
    pid: int
    mark_address: int
    mark: bytes
    """Bytes at `mark_address` of the process: who can read them there can read its memory (cross-memory attach)."""
    rdma: bool
    """Whether the host has an RDMA device."""


@cache
def whereabouts() -> Whereabouts:
    """This process's place."""
    mark = secrets.token_bytes(_MARK_BYTES)
    return Whereabouts(PROCESS, _boot_id(), os.getpid(), ctypes.addressof(_keep(mark)), mark, _has_rdma())


def can_attach(other: Whereabouts) -> bool:
    """Whether this process can read the other's memory, found by reading its mark; False on other systems and hosts.

    What denies it: another host, PID namespace or user, and ptrace restrictions.
    """
    return peek(other, 0, 0) is not None


def peek(other: Whereabouts, address: int, size: int) -> bytes | None:
    """Bytes of another process of this host; None unless it is still that process and lets itself be read."""
    if other.boot != whereabouts().boot or not other.boot or _process_vm_readv is None:
        return None
    found = ctypes.create_string_buffer(_MARK_BYTES + size)
    local = _IoVec(ctypes.addressof(found), _MARK_BYTES + size)
    remote = (_IoVec * 2)(_IoVec(other.mark_address, _MARK_BYTES), _IoVec(address, size))
    got = _process_vm_readv(other.pid, ctypes.byref(local), 1, remote, 2 if size else 1, 0)
    if got != _MARK_BYTES + size or found.raw[:_MARK_BYTES] != other.mark:
        return None
    return found.raw[_MARK_BYTES:]


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


_kept: list[object] = []


def _keep(mark: bytes) -> ctypes.Array[ctypes.c_char]:
    buffer = ctypes.create_string_buffer(mark, len(mark))
    _kept.append(buffer)
    return buffer


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _has_rdma() -> bool:
    folder = Path("/sys/class/infiniband")
    return folder.is_dir() and any(folder.iterdir())


def _find_process_vm_readv() -> Callable[..., int] | None:
    """The system call behind cross-memory attach, where there is one."""
    read = getattr(ctypes.CDLL(None), "process_vm_readv", None)
    if read is not None:
        read.restype = ctypes.c_ssize_t
        read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
    return read


_process_vm_readv = _find_process_vm_readv()
