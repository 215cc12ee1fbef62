"""Freed memory, kept for what comes next: for a CPU what PyTorch's caching allocator is for a GPU."""

import ctypes
import sys
from contextlib import suppress

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them


def keep_freed_memory() -> None:
    """Have this process's malloc give no tensor of up to 32 MB back to the system from now on, where it is glibc's.

    The system hands memory out in pages of 4 kB, zeroed, each with an interruption of the program when it is first touched. As
    malloc comes it gives back what lies free at the end of its heap, and a step of training 125m asks for it again: with LoRA in
    60,000 pages, a tenth of its time. A step needs what the one before it freed, as a weight that is quantised needs what the
    one before it did.
    Larger tensors still come and go one by one: kept in the heap, the holes that they leave may not fit the next."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another libc, without mallopt
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(MMAP_THRESHOLD, 32 << 20)  # the most that it takes
            mallopt(TRIM_THRESHOLD, -1)  # never
