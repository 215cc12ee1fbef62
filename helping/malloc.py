"""Freed memory, kept for what comes next: for a CPU what PyTorch's caching allocator is for a GPU."""

import ctypes
import sys
from contextlib import suppress

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # names of malloc.h, less its M_


def keep_freed_memory() -> None:
    """Have this process's malloc give nothing back to the system from now on, where it is glibc's.

    As it comes, malloc asks the system for every tensor of more than 32 MB, and for many smaller ones, and gives it back when
    it is freed. The system hands memory out in pages of 4 kB, zeroed, each with an interruption of the program when first
    touched: in a step of training 125m, 60,000 of them with LoRA and 250,000 with all weights, an eighth and a fifth of the
    time. A step allocates what the one before it did, so that its memory can be the same."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another libc, without mallopt
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(MMAP_MAX, 0)  # no tensor is mapped in from the system on its own, all are cut from one heap
            mallopt(TRIM_THRESHOLD, -1)  # whose free end stays, however long
