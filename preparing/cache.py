"""The cache: tokens of large data in a file that is mapped, not read, written once for all runs and processes that ask for it."""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import time
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

from data import IGNORE, Tokenizer, count_supervised
from helping.files import flush_to_disk
from helping.flags import REPOSITORY
from preparing.readers import DataError, reader_of

CACHE_FROM = 2**25  # bytes of data; tokenising less takes seconds, and its tokens fit in memory many times over

KEPT_FOR = 90 * 24 * 3600  # seconds after which tokens that no run asked for are forgotten: no run is as long

# What decides, beside files and settings, which tokens come out: where it is changed, nothing kept from before is right.
PROGRAMS = REPOSITORY / "data.py", REPOSITORY / "running" / "reading.py", *sorted((REPOSITORY / "preparing").glob("*.py"))


def cache_folder(paths, tokenizer: Tokenizer, *settings) -> Path | None:
    """Where the tokens of these files under these settings are kept: a name made of the content of all that decides them.
    None for data so small that there is nothing to save."""
    if sum(Path(path).stat().st_size for path in paths) < CACHE_FROM:
        return None
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "nanotune" / content_key(settings, paths, tokenizer)


def content_key(settings, paths, tokenizer: Tokenizer) -> str:
    """A name that changes with the settings, the tokenizer, the programs, or the content or the kind of the files."""
    kinds = [reader_of(Path(path)).__name__ for path in paths]  # the lines of a .jsonl are other records in a .txt
    key = hashlib.blake2b(
        repr((settings, kinds, tokenizer.added)).encode() + tokenizer.pieces.serialized_model_proto(), digest_size=16
    )
    for path in (*paths, *PROGRAMS):
        key.update(_digest(str(path), os.stat(path).st_mtime_ns))
    return key.hexdigest()


@functools.cache
def _digest(path: str, changed: int) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


class TokenFile:
    """Documents in a memory-mapped file, read as a list of (ids, labels): 4 bytes a token on disk, and in memory what is in use.

    A label is the token's own id or -100, so one number holds both: a token that is only read is stored as its complement ~id."""

    def __init__(self, folder: Path):
        self.ends, self.supervised = (np.fromfile(folder / name, np.int64) for name in ("ends.bin", "supervised.bin"))
        self.sizes = np.diff(self.ends, prepend=0)
        self.tokens = np.memmap(folder / "tokens.bin", np.int32, "r") if len(self.ends) else np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int):
        tokens = np.asarray(self.tokens[self.ends[i] - self.sizes[i] : self.ends[i]])
        return np.where(tokens < 0, ~tokens, tokens), np.where(tokens < 0, IGNORE, tokens)


def write_tokens(folder: Path, documents, fates: Counter) -> None:
    ends, supervised = array("q"), array("q")  # written by Python: NumPy's tofile and save are silent where the disk is full
    with open(folder / "tokens.bin", "wb") as file:
        for ids, labels in documents:
            file.write(np.where(labels == IGNORE, ~ids, ids))
            ends.append(len(ids) + (ends[-1] if ends else 0))
            supervised.append(count_supervised(labels))
    (folder / "ends.bin").write_bytes(ends)
    (folder / "supervised.bin").write_bytes(supervised)
    (folder / "fates.json").write_text(json.dumps(fates))


def once(folder: Path, write) -> None:
    """Have write(temporary folder) done once for all processes that ask for the same folder: the first does it, the others wait.

    It is written beside and renamed into place, so that a folder of this name is whole; if the writer dies or fails, the next
    one begins anew."""
    if folder.is_dir():  # for good: where it lies need not be writable any more
        with contextlib.suppress(OSError):
            os.utime(folder)
        return
    temporary = folder.with_name(f"{folder.name}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.lock", "wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the process ends, however it ends
            except OSError:  # a disk that knows no locks: each writes for itself, and the first wins
                temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
            if folder.is_dir():
                return
            _forget_unused(folder.parent)
            shutil.rmtree(temporary, ignore_errors=True)  # of a writer that was killed
            temporary.mkdir()
            try:
                write(temporary)
                for path in temporary.iterdir():
                    flush_to_disk(path)  # or a machine that loses power could keep the name, and not what it stands for
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if not folder.is_dir():
            reason = error.strerror or error
            raise DataError(f"{folder.parent} cannot keep the tokens: {reason}; XDG_CACHE_HOME names another place") from None


def _forget_unused(home: Path) -> None:
    for path in home.iterdir():
        with contextlib.suppress(OSError):  # of another user, or gone meanwhile
            if path.stat().st_mtime < time.time() - KEPT_FOR:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
