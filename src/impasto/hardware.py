"""The device under a measurement: its time, its memory, its state, and what it can do at best."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from typing import Any, Protocol

import torch

Fact = str | float | int | None
_PACKAGES = ("impasto", "torch", "transformers", "accelerate", "triton", "vllm", "lm_eval", "numpy")
_FIELDS = {  # what the driver is asked, and what it is called here
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "temperature.gpu": "celsius",
    "power.draw": "watts",
    "pstate": "state",
}
_REASONS = {  # bits of the driver's mask that mean less speed than the clocks of an undisturbed device give
    0x4: "power limit",
    0x8: "hardware slowdown",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
}
_MASKS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # new and old name of the same
_COPY = {"cuda": 1 << 30, "cpu": 1 << 25}  # bytes that are copied
_SIDE = {"cuda": 8192, "cpu": 512}  # of the matrices that are multiplied
_TIMES = 10


class Watch(Protocol):
    """Tells the device's time."""

    def wait(self) -> None:
        """Return when the device has done all it was given."""

    def mark(self) -> Any:
        """A mark behind everything the device was given so far."""

    def between(self, marks: Sequence[Any]) -> list[float]:
        """Milliseconds between neighbouring marks; waits for the last one."""


class HostWatch:
    """The host's clock, for devices that work while the host waits.

    Args:
        device: where the work is done; what is queued there is waited for at every mark.
        now: gives seconds.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self.device = device
        self.now = now

    def wait(self) -> None:
        """Return when the device has done all it was given."""
        if self.device.type == "mps":
            torch.mps.synchronize()

    def mark(self) -> float:
        """Seconds, once all is done."""
        self.wait()
        return self.now()

    def between(self, marks: Sequence[float]) -> list[float]:
        """Milliseconds between neighbouring marks."""
        return [(after - before) * 1e3 for before, after in pairwise(marks)]


class CudaWatch:
    """Events in the current stream: the GPU's own clock, with a resolution of half a microsecond."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        """Return when the device has done all it was given."""
        torch.cuda.synchronize(self.device)

    def mark(self) -> torch.cuda.Event:
        """An event behind everything in the current stream."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        """Milliseconds between neighbouring events."""
        self.wait()
        return [float(before.elapsed_time(after)) for before, after in pairwise(marks)]


def watch_of(device: torch.device) -> Watch:
    """The watch that fits a device."""
    return CudaWatch(device) if device.type == "cuda" else HostWatch(device)


@dataclass
class Peak:
    """Bytes allocated at the most inside a `with` block, beyond those that were there; None if unknown."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Watch the allocator of a CUDA device; other devices keep no such count."""
    found = Peak()
    if device.type != "cuda":
        yield found
        return
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        yield found
    finally:
        found.bytes = max(0, torch.cuda.max_memory_allocated(device) - before)


@dataclass(frozen=True, slots=True)
class State:
    """Clocks, temperature and power of a device now, and why it is held back, if it is."""

    facts: Mapping[str, Fact]
    throttled: tuple[str, ...] = ()


Ask = Callable[[Sequence[str]], str]


class Sensor:
    """Asks the driver of an NVIDIA device through `nvidia-smi`; gives None where that does not answer.

    Args:
        device: the device.
        ask: runs a command line and returns what it prints.
    """

    def __init__(self, device: torch.device, ask: Ask | None = None) -> None:
        self._ask = ask or _run
        self._which: list[str] = []
        self._fields: list[str] = []
        if device.type != "cuda" and ask is None:
            return
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            name = getattr(torch.cuda.get_device_properties(index), "uuid", None)
            self._which = ["-i", f"GPU-{name}"]
            if not self._values(["name"]):  # a part of a device, or a driver that numbers them only
                self._which = ["-i", str(index)]
        masks = [mask for mask in _MASKS if "".join(self._values([mask])).startswith("0x")]
        self._fields = [*_FIELDS, *masks[:1]]

    def read(self) -> State | None:
        """The state of the device now."""
        values = self._values(self._fields) if self._fields else []
        if not values:
            return None
        facts = {name: _number(value) for name, value in zip(_FIELDS.values(), values, strict=False)}
        bits = int(values[-1], 16) if len(values) > len(_FIELDS) else 0
        return State(facts, tuple(reason for bit, reason in _REASONS.items() if bits & bit))

    def _values(self, fields: Sequence[str]) -> list[str]:
        command = ["nvidia-smi", *self._which, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            values = [value.strip() for value in self._ask(command).strip().split(",")]
            if len(values) == len(fields):
                return values
        return []


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout


def _number(text: str) -> Fact:
    try:
        return float(text)
    except ValueError:
        return None if text.startswith("[") else text


def limits(device: torch.device, dtype: torch.dtype, watch: Watch) -> dict[str, float]:
    """What the device does at best: bytes per second of a large copy ("copy") and a matrix-vector product ("read").

    "matmul" is the rate of operations of a large square product in `dtype`. A copy counts what it reads and what it
    writes. Each is the median of ten, after three that do not count.
    """
    count = _COPY.get(device.type, _COPY["cpu"]) // dtype.itemsize
    side = _SIDE.get(device.type, _SIDE["cpu"])
    source = torch.ones(count, dtype=dtype, device=device)
    target = torch.empty_like(source)
    matrix, vector = source.view(-1, 4096), source[:4096]
    left = torch.full((side, side), 1 / side, dtype=dtype, device=device)
    works: tuple[tuple[str, Callable[[], Any], float], ...] = (
        ("copy", lambda: target.copy_(source), 2 * source.nbytes),
        ("read", lambda: torch.mv(matrix, vector), source.nbytes),
        ("matmul", lambda: left @ left, 2.0 * side**3),
    )
    found = {}
    for name, work, amount in works:
        for _ in range(3):
            work()
        samples = []
        for _ in range(_TIMES):
            watch.wait()
            before = watch.mark()
            work()
            samples += watch.between([before, watch.mark()])
        found[name] = amount / max(statistics.median(samples), 1e-9) * 1e3
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """What this runs on, and with which packages; nothing in it names a person, a host or a place."""
    versions = {"impasto": "source tree"}  # unless it is installed
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "begun": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
