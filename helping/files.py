"""What the operating system knows of a process and its files."""

import contextlib
import fcntl
import math
import os
import resource
import sys
from pathlib import Path

import torch


def readable(path: Path) -> None:
    """Give a file the permissions of any new one: safetensors writes for its owner alone, and a server may be another user."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def is_picture(path: str) -> bool:
    """Whether a figure can be saved under this name, as far as the name says."""
    return Path(path).suffix in (".png", ".pdf", ".svg") and Path(path).parent.is_dir() and not Path(path).is_dir()


@contextlib.contextmanager
def writing(path):
    """Name the file in the error of a write that fails: of a full disk the system says no more than that."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}") from None


def flush_to_disk(path: Path) -> None:
    """Return when a file, or a folder's list of names, would survive the machine losing power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def alone(folder: Path, busy: Exception):
    """The folder, made if it is not there, for this process alone: raises `busy` if another is at work in it. The system lets go
    of the lock when the process ends, however it ends."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError:  # a disk that knows no locks
            pass
        try:
            yield
        finally:
            if made:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # if nothing came into it; by whoever was refused it would be taken from under the other
    finally:
        os.close(handle)


def free_memory() -> float:
    """Bytes that processes can still have of this machine's memory, as Linux estimates; infinity where nobody says."""
    try:
        known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(known["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return math.inf


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that the allocator had on CUDA; elsewhere the most that the process had, mapped files included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
