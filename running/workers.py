"""The processes of a run: what they have to tell each other, and what the outside has to tell them.

torchrun starts N processes, gives each its rank, and ends all when one fails. What they do together are sums and barriers: every
one of them must come, in the same order, or the others wait for it until the timeout."""

import contextlib
import copy
import math
import os
import signal
import threading
from datetime import timedelta
from functools import cache
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from running.settings import RunError

PATIENCE = timedelta(minutes=10)  # within which a process that died is noticed at the latest


def restarts() -> int:
    """How often torchrun has begun the processes of this run anew (--max-restarts)."""
    return meet()[1] if int(os.environ.get("WORLD_SIZE", 1)) > 1 else int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


@cache
def meet() -> tuple[dist.Store, int]:
    """(a store for the processes that were begun together, how often others had been before them)

    torchrun's own store outlives the processes that it begins anew, and still holds what the dead have told each other. And it
    counts on each machine for itself: one whose processes were well does not count that they were begun anew with the others. So
    the first process draws a name for this attempt and answers who calls it by that; who has read the name of a dead one gets
    no answer, and reads again."""
    store = next(dist.rendezvous("env://", timeout=PATIENCE))[0]
    rank, world, count = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"))
    own = uuid4().hex
    if rank == 0:
        store.set("first", own)
        others = [store.get(f"{own} {other}").decode().split() for other in range(1, world)]
        count += sum(int(counted) for _, counted in others)
        for name, _ in others:
            store.set(f"{own} {name}", str(count))
        return dist.PrefixStore(own, store), count
    for _ in range(PATIENCE.seconds):
        first = store.get("first").decode()
        store.set(f"{first} {rank}", f"{own} {count}")
        with contextlib.suppress(dist.DistStoreError):
            store.wait([f"{first} {own}"], timedelta(seconds=1))
            return dist.PrefixStore(first, store), int(store.get(f"{first} {own}"))
    raise RunError(f"the first of {world} processes did not answer in {PATIENCE.seconds} seconds")


class NotFinite(RunError):
    """A loss or a gradient that is NaN or infinite; `ranks` are those whose own it was."""

    ranks: tuple[int, ...] = ()


class Workers:
    """The processes of torchrun: how many, which one this is, and sums over all. One process needs no torchrun and no group."""

    def __init__(self, device: torch.device, world: int | None = None):
        self.world, self.rank = world or int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.first, self.device, self.group = self.rank == 0, device, None
        if device.type == "cuda" and device.index is not None:  # without a number it is the current one
            torch.cuda.set_device(device)
        if self.world > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=meet()[0], rank=self.rank, world_size=self.world, timeout=PATIENCE)

    def beside(self) -> "Workers":
        """The same processes for another thread: their own group keeps what they do there from meeting the loop's sums."""
        other = copy.copy(self)
        if self.world > 1:
            other.group, other.device = dist.new_group(backend="gloo"), torch.device("cpu")
        return other

    def say(self, text: str, **how) -> None:
        if self.first:
            print(text, **how)

    def sum(self, value: float) -> float:
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.group)
        return total.item()

    def sum_finite(self, loss: float) -> float:
        """The sum of a loss over all ranks. Raises NotFinite on every rank if that of any is not finite."""
        total = self.sum(loss)
        if not math.isfinite(total):
            error = NotFinite(f"the loss is {total}")
            finite = self.gather([math.isfinite(loss)])
            error.ranks = tuple(rank for rank, fine in enumerate(finite) if not fine)
            raise error
        return total

    def gather(self, values: list) -> list:
        """All ranks' lists as one, where rank r had taken elements r, r + world, ... of it."""
        if self.world == 1:
            return values
        parts = [None] * self.world
        dist.all_gather_object(parts, values, group=self.group)
        return [parts[i % self.world][i // self.world] for i in range(sum(map(len, parts)))]

    def wait(self):
        if self.world > 1:
            dist.barrier(self.group)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that the processes hold together. All of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def asking(model: torch.nn.Module):
    """The model as it is asked, not trained. Embedding, last norm and head of one in shards stay gathered after a forward pass,
    for the backward that follows in training. None does here: left so, a checkpoint would hold them without their moments,
    and what is read from one would go into the gathered copy, to be forgotten."""
    model.eval()
    yield
    model.train()
    if isinstance(model, FSDPModule):
        model.reshard()


def packed_together(linear: type) -> type:
    """quant.NF4Linear for processes that load the same weights: each packs a part of every one (7B takes one core 80 s)."""
    return type(linear.__name__, (linear,), {"among": (dist.get_rank(), dist.get_world_size(), dist.all_reduce)})


class Stopped(Exception):
    """The run was asked to stop and did so after saving."""


class StopSignal:
    """Notes a first SIGTERM or Ctrl-C in `asked`, for the loop to finish its step and save; a second one interrupts at once."""

    def __enter__(self):
        self.asked, self.before = False, {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other one handle signals
            self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
