"""Reads what fakecuda recorded, in the process it serves (started by the runner ``fakecuda``).

    with fakecuda.record() as log:
        optimizer.step()
    print(log)                                   # log.launches, .copies, .waits, .allocations, .errors, .names
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import subprocess
from collections import Counter
from dataclasses import dataclass, field

WAITS, PAGEABLE, CAPTURED, STUB, ALLOCATES = 1, 2, 4, 8, 16
KINDS = {0: "HtoH", 1: "HtoD", 2: "DtoH", 3: "DtoD"}


class _Call(ctypes.Structure):  # FakeCall of fakecuda.h
    _fields_ = (
        [("call", ctypes.c_char_p), ("kernel", ctypes.c_char_p), ("bytes", ctypes.c_uint64)]
        + [(name, ctypes.c_int32) for name in ("device", "stream", "kind", "result")]
        + [(name, ctypes.c_uint32) for name in ("flags", "grid", "block", "shared")]
    )


@functools.cache
def library():
    found = ctypes.CDLL("libcudart.so.13")
    found.fakecuda_count.restype = ctypes.c_size_t
    found.fakecuda_calls.restype = ctypes.POINTER(_Call)
    return found


@functools.cache
def demangled(name: str) -> str:
    return subprocess.run(["c++filt", "-p", name], capture_output=True, text=True).stdout.strip()


def short(name: str) -> str:
    """A kernel's name without namespaces, and with the functors of torch's elementwise kernels alone."""
    full = demangled(name)
    for noise in ("at::native::", "(anonymous namespace)::", "void ", "at::", "c10::"):
        full = full.replace(noise, "")
    return full


@dataclass
class Call:
    call: str
    kernel: str | None
    bytes: int
    device: int
    stream: int
    kind: int
    result: int
    flags: int
    grid: int
    block: int
    shared: int


@dataclass
class Log:
    calls: list[Call] = field(default_factory=list)

    @property
    def launches(self):
        return [c for c in self.calls if c.kernel is not None]

    @property
    def kernels(self) -> Counter:
        return Counter(short(c.kernel) for c in self.launches)

    @property
    def copies(self) -> Counter:
        """(direction, bytes, "pinned" or "pageable") of every copy."""
        copies = [c for c in self.calls if c.kind >= 0]
        return Counter((KINDS[c.kind], c.bytes, "pageable" if c.flags & PAGEABLE else "pinned") for c in copies)

    @property
    def memsets(self):
        return [c for c in self.calls if "emset" in c.call]

    @property
    def waits(self) -> Counter:
        return Counter(c.call + (" (pageable)" if c.flags & PAGEABLE else "") for c in self.calls if c.flags & WAITS)

    @property
    def allocations(self) -> Counter:
        return Counter(c.call for c in self.calls if c.flags & ALLOCATES)

    @property
    def errors(self):
        return [(c.call, c.result) for c in self.calls if c.result]

    @property
    def names(self) -> Counter:
        return Counter(c.call for c in self.calls)

    def __str__(self):
        parts = {
            "calls": dict(self.names), "kernels": dict(self.kernels), "copies": dict(self.copies), "waits": dict(self.waits),
            "allocations": dict(self.allocations), "errors": self.errors,
        }
        return "\n".join(f"{name}: {what}" for name, what in parts.items() if what)


@contextlib.contextmanager
def record():
    """Every call until the end of the block."""
    lib, log = library(), Log()
    lib.fakecuda_clear()
    lib.fakecuda_record(1)
    try:
        yield log
    finally:
        lib.fakecuda_record(0)
        calls = lib.fakecuda_calls()
        for i in range(lib.fakecuda_count()):
            values = (getattr(calls[i], name) for name, _ in _Call._fields_)
            log.calls.append(Call(*(v.decode() if isinstance(v, bytes) else v for v in values)))
        lib.fakecuda_clear()
