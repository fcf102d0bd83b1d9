"""When memory runs out, and what becomes of memory that was given back."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

Batch = TypeVar("Batch")
Result = TypeVar("Result")

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory")  # what devices and allocators say


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out; devices other than GPUs, and the CPU's allocator, raise a bare one."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error).lower() for sign in _SIGNS)


def tried(work: Callable[[], Result]) -> Result | None:
    """What `work` returns, which is never None, or None where memory ran out; then everything it held is free again."""
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
    free()
    return None


def batch_by_batch(
    queue: list[Batch], run: Callable[[Batch], Result], smaller: Callable[[list[Batch]], list[Batch]]
) -> Iterator[tuple[Batch, Result]]:
    """Run batches one after another; where one does not fit into memory, what is left is cut smaller and goes on.

    Args:
        queue: the batches.
        run: what is done with one; it never returns None.
        smaller: cuts what is left, the batch that did not fit first; raises where that cannot be cut.

    Yields:
        Each batch that was run, and what `run` made of it.
    """
    while queue:
        found = tried(functools.partial(run, queue[0]))
        if found is None:
            queue = smaller(queue)
        else:
            yield queue[0], found
            queue = queue[1:]


def free() -> None:
    """Hand what was given back and is still held in reserve to whoever asks next."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def keep_freed() -> None:
    """Let glibc keep large freed blocks instead of handing them back to the system after every matrix product.

    Without this every large temporary costs its page faults anew, which a vocabulary-wide product feels. Elsewhere
    than on glibc nothing happens.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
