"""Recording a sequence of kernels once and replaying it; running branches side by side.

Two backends with one face: `Cuda` records CUDA graphs and forks branches onto streams, `Eager` calls what it is given,
branch after branch. Everything above this module is the same for both, and is tested with `Eager`.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

Work = Callable[[], None]


class Backend(Protocol):
    """How a step is recorded and how branches run side by side."""

    @property
    def streams(self) -> int:
        """How many streams beside the main one are in use."""

    def record(self, work: Work, undo: Work) -> Work:
        """`work` as something that can be called again and again; `undo` takes back what one call changed."""

    def fork(self, branches: int) -> AbstractContextManager[Sequence[AbstractContextManager[Any]]]:
        """One context manager per branch, to run its work in; all of it is done where the fork ends."""

    def wait(self) -> None:
        """Return when the device has done all it was given."""


class Eager:
    """No recording, no streams: the same step, called."""

    streams = 0

    def record(self, work: Work, undo: Work) -> Work:
        """`work` itself."""
        return work

    @contextlib.contextmanager
    def fork(self, branches: int) -> Iterator[Sequence[AbstractContextManager[Any]]]:
        """Branches one after another."""
        yield [nullcontext()] * branches

    def wait(self) -> None:
        """Nothing is ever pending."""


@contextlib.contextmanager
def _workspaces() -> Iterator[None]:
    """Inside, cuBLAS gets workspaces anew, and so from the memory of what is being recorded.

    Those that it got before, on streams that are recorded again, torch frees whenever somebody asks it to, as
    `torch.compile` does before graphs of its own; a recording that uses them would then write into anybody's memory.
    This asks the same of all streams: a recording by others that is not safe from `torch.compile` is not safe from it.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


class Cuda:
    """CUDA graphs, and one stream per branch.

    A stream belongs to one place in the tree of groups, and the place around it waits for it, and it for that place,
    at every fork and join. So memory that one stream frees is never reused by it before its readers are done.

    Args:
        device: a CUDA device.
        parallel: fork branches onto streams; False runs them one after another.
        warmup: how often a step runs before it is recorded (libraries load their kernels then).
        collect: collect Python's garbage before each recording, which can hold memory of the device.
    """

    def __init__(self, device: torch.device, *, parallel: bool = True, warmup: int = 2, collect: bool = True) -> None:
        self.device = device
        self.parallel = parallel
        self.warmup = warmup
        self.collect = collect
        self._pool: Any = None
        self._streams: dict[tuple[int, ...], torch.cuda.Stream] = {}
        self._place: tuple[int, ...] = ()

    @property
    def streams(self) -> int:
        """How many streams beside the main one are in use."""
        return len(self._streams)

    def record(self, work: Work, undo: Work) -> Work:
        """Warm up, then record; the recorded kernels have not run when this returns."""
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(self.warmup):
                    work()
                    undo()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            if self.collect:
                gc.collect()
            graph = torch.cuda.CUDAGraph()
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            try:
                with _workspaces(), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    work()
            except Exception:
                self._pool = None  # a recording that broke off leaves its memory pool in no state to share
                raise
            torch.cuda.synchronize()
        return graph.replay

    @contextlib.contextmanager
    def fork(self, branches: int) -> Iterator[Sequence[AbstractContextManager[Any]]]:
        """Each branch on a stream that waits for the current one, which waits for all of them at the end."""
        if not self.parallel:
            yield [nullcontext()] * branches
            return
        here = torch.cuda.current_stream(self.device)
        places = [(*self._place, branch) for branch in range(branches)]
        for place in places:
            if place not in self._streams:
                self._streams[place] = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            self._streams[place].wait_stream(here)
        yield [self._on(place) for place in places]
        for place in places:
            here.wait_stream(self._streams[place])

    @contextlib.contextmanager
    def _on(self, place: tuple[int, ...]) -> Iterator[None]:
        outer, self._place = self._place, place
        try:
            with torch.cuda.stream(self._streams[place]):
                yield
        finally:
            self._place = outer

    def wait(self) -> None:
        """Return when the device has done all it was given."""
        torch.cuda.synchronize(self.device)
