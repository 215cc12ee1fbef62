"""The cache: tokens of large data in a file that is mapped, not read, written once for all runs and processes that ask for it."""

import functools
import hashlib
import json
import os
import shutil
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

from data import IGNORE, Tokenizer, count_supervised

CACHE_FROM = 2**25  # bytes of data; tokenising less takes seconds, and its tokens fit in memory many times over


def cache_folder(paths, tokenizer: Tokenizer, *settings) -> Path | None:
    """Where the tokens of these files under these settings are kept: a name made of the content of all that decides them.
    None for data so small that there is nothing to save."""
    if sum(Path(path).stat().st_size for path in paths) < CACHE_FROM:
        return None
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "nanotune" / content_key((2, *settings), paths, tokenizer)


def content_key(settings, paths, tokenizer: Tokenizer) -> str:
    """A name that changes with the settings, the tokenizer or the content of the files."""
    key = hashlib.blake2b(repr(settings).encode() + tokenizer.pieces.serialized_model_proto(), digest_size=16)
    for path in paths:
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
        self.ends = np.load(folder / "ends.npy")
        self.sizes, self.supervised = np.diff(self.ends, prepend=0), np.load(folder / "supervised.npy")
        self.tokens = np.memmap(folder / "tokens.bin", np.int32, "r") if len(self.ends) else np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int):
        tokens = np.asarray(self.tokens[self.ends[i] - self.sizes[i] : self.ends[i]])
        return np.where(tokens < 0, ~tokens, tokens), np.where(tokens < 0, IGNORE, tokens)


def write_tokens(folder: Path, documents, fates: Counter) -> None:
    ends, supervised = array("q"), array("q")
    with open(folder / "tokens.bin", "wb") as file:
        for ids, labels in documents:
            np.where(labels == IGNORE, ~ids, ids).tofile(file)
            ends.append(len(ids) + (ends[-1] if ends else 0))
            supervised.append(count_supervised(labels))
    np.save(folder / "ends.npy", np.array(ends, np.int64))
    np.save(folder / "supervised.npy", np.array(supervised, np.int64))
    (folder / "fates.json").write_text(json.dumps(fates))


def once(folder: Path, write) -> None:
    """Have write(temporary folder) done once for all processes that ask for the same folder: the first does it, the others wait.

    It is written beside and renamed into place, so that a folder of this name is whole; if the writer dies or fails, the next
    one begins anew."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f"{folder.name}.tmp")
    with open(f"{folder}.lock", "wb") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the process ends, however it ends
        except (ImportError, OSError):  # no locks on this system or file system: each writes for itself, and the first wins
            temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        if folder.is_dir():
            return
        shutil.rmtree(temporary, ignore_errors=True)  # of a writer that was killed
        temporary.mkdir()
        try:
            write(temporary)
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
