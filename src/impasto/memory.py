"""When memory runs out, and what becomes of memory that was given back."""

from __future__ import annotations

import contextlib
import ctypes
import sys

import torch

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory")  # what devices and allocators say


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out; devices other than GPUs, and the CPU's allocator, raise a bare one."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error).lower() for sign in _SIGNS)


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
