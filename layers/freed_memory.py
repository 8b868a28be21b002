"""What the process does with memory that it frees, on a CPU under Linux."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MOST = 2**31 - 1  # bytes: mallopt takes an int
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
TUNABLES = ("glibc.malloc.mmap_threshold", "glibc.malloc.trim_threshold")  # in GLIBC_TUNABLES


def keep_freed_memory() -> bool:
    """Have the C library keep freed blocks of up to 2 GiB, for the next tensors of that size.

    By default glibc gives blocks above 32 MiB back to the system as they are freed, and each new one costs a page fault
    for every 4 KiB: a layer that reads long rows on a CPU can spend most of its time on those. The price: the process
    shrinks less between peaks. Call it before tensors of that size are made; it holds for the rest of the process.

    Returns:
        Whether it was done: False where the C library is not glibc, and where ``MALLOC_MMAP_THRESHOLD_``,
        ``MALLOC_TRIM_THRESHOLD_`` or ``GLIBC_TUNABLES`` of the environment says what to do. Another allocator that was
        loaded before glibc's, such as jemalloc, is not noticed, and does as it did.
    """
    told = any(name in os.environ for name in VARIABLES)
    told = told or any(name in os.environ.get("GLIBC_TUNABLES", "") for name in TUNABLES)
    if told or not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl, for one, has another allocator
        return False
    mapped, trimmed = library.mallopt(M_MMAP_THRESHOLD, MOST), library.mallopt(M_TRIM_THRESHOLD, MOST)
    return bool(mapped and trimmed)
