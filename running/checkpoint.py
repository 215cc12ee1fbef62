"""Checkpoints: what `train.py --resume` goes on from, whenever and however the run has died.

    checkpoint-200/__0_0.distcp ...   the trained weights and the optimizer's state, of each process its shards
    checkpoint-200/.metadata          which part of which tensor lies where: any number of processes finds its own again
    checkpoint-200/state.json         the step, the log so far, and the checksum of every other file; written last

A folder is written beside its place and renamed when all of it is on the disk. A rename happens or does not: a machine that dies
in the middle leaves a folder whose name ends in .tmp, which nobody reads, and the checkpoint before. What a disk has changed
since is found by the checksums, and refused by name.

Writing takes a disk's time, and a run need not wait for it. With --async_save it waits only until what is to be saved has been
copied, so that its next step may change the original; a thread then writes the copy. At most one save is on its way.
"""

import contextlib
import json
import math
import os
import shutil
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from helping.files import flush_to_disk, writing
from running.settings import RunError

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process is told that it is one


@contextlib.contextmanager
def written_whole(folder: Path, workers):
    """A new folder for all ranks to write into, which gets its name when everything is on the disk. If that fails it is gone:
    RunError."""
    temporary, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old.tmp")
    first = workers.first
    try:
        if first:
            put_back(folder)
            for left_over in (temporary, old):
                shutil.rmtree(left_over, ignore_errors=True)
            temporary.mkdir(parents=True)
        workers.wait()
        if not temporary.is_dir():
            raise RunError(f"the first rank made {temporary}, and it is not here: all nodes must share the disk of --output_dir")
        yield temporary
        workers.wait()
        if first:
            for path in temporary.iterdir():
                flush_to_disk(path)
            if folder.exists():
                folder.rename(old)
            temporary.rename(folder)
            flush_to_disk(folder.parent)  # the new name itself
            shutil.rmtree(old, ignore_errors=True)
        workers.wait()
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:  # libraries' own words for a full disk
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
        free = shutil.disk_usage(folder.parent).free / 1e9
        reason = (str(error) or type(error).__name__).splitlines()[0]
        about = f"{free:.2f} GB are free on its disk; what was there stands"
        raise RunError(f"could not write {folder}, and {about}: {reason}") from None
    finally:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Undo what a kill between the two renames of `written_whole` leaves: the folder under another name than its own."""
    old = folder.with_name(folder.name + ".old.tmp")
    with contextlib.suppress(FileNotFoundError):  # another rank was faster
        if old.exists() and not folder.exists():
            old.rename(folder)


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with writing(path):
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # there if that failed


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted((p for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()), key=lambda p: int(p.name[11:]))


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


FORMAT = 1  # of a checkpoint's folder


def suffix(weight: torch.Tensor, state: torch.Tensor) -> str:
    """What names a rank's own state of a weight in shards: 8-bit moments, whose blocks of 256 are those of this very shard."""
    alone = isinstance(weight, DTensor) and not isinstance(state, DTensor) and state.dim()
    return f".{dist.get_rank()}of{'x'.join(map(str, weight.device_mesh.shape))}" if alone else ""  # of4; with --hsdp 2, of2x2


def tensors_of(model: nn.Module, optimizer=None) -> dict[str, torch.Tensor]:
    """What a checkpoint holds, by name: the trained weights, and of the optimizer what belongs to each."""
    tensors = {f"weights.{name}": weight for name, weight in trained_weights(model).items()}
    if optimizer is not None:
        for name, weight in model.named_parameters():
            state = optimizer.state.get(weight, {}).items()
            tensors |= {f"optimizer.{name}.{key}{suffix(weight, x)}": x for key, x in state if isinstance(x, torch.Tensor)}
    return tensors


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], about: dict, workers) -> None:
    """Write the shards of all ranks (torch.distributed.checkpoint, which any number of processes can read again), and last
    state.json: `about`, and the checksum of every file."""
    with written_whole(folder, workers) as temporary:
        storage = FileSystemWriter(temporary, sync_files=True)
        dcp.save(tensors, storage_writer=storage, process_group=workers.group, no_dist=workers.world == 1)
        if workers.first:
            sums = {path.name: checksum(path) for path in temporary.iterdir()}
            shapes = {name: list(x.shape) for name, x in tensors.items() if name.startswith("weights.")}
            write_text(temporary / "state.json", json.dumps({"format": FORMAT, "shapes": shapes, "files": sums} | about))


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    total = 0
    with open(path, "rb") as file:
        while piece := file.read(2**24):
            total = zlib.crc32(piece, total)
    return total


def read_state(folder: Path, model: nn.Module, remedy="without its folder, --resume takes the checkpoint before it") -> dict:
    """A checkpoint's state.json, once all that the folder holds is found as it was written and for this model."""
    put_back(folder)
    try:
        state = json.loads((folder / "state.json").read_text())
        if state["format"] != FORMAT:
            raise RunError(f"{folder} is in format {state['format']} of a newer train.py; this one reads {FORMAT}")
        for name, expected in state["files"].items():
            if checksum(folder / name) != expected:
                raise RunError(f"{folder / name} is not as it was written, its checksum differs; {remedy}")
    except FileNotFoundError as error:
        raise RunError(f"{error.filename} is missing; {remedy}") from None
    except RunError:
        raise
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise RunError(f"{folder / 'state.json'} cannot be read ({error}); {remedy}") from None
    if state["shapes"] != {f"weights.{name}": list(x.shape) for name, x in trained_weights(model).items()}:
        raise RunError(f"{folder} holds other weights than this run trains")
    return {name: value for name, value in state.items() if name not in ("format", "shapes", "files")}


def make_state(model: nn.Module, optimizer) -> None:
    """Have the optimizer make the state that it makes in its first step: one with gradients of zero and, before the loop, a
    rate of zero, which changes no weight."""
    for weight in model.parameters():
        if weight.requires_grad:  # one after the other: --optimizer_in_backward has no room for all gradients
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
            weight.grad = None


def restore(folder: Path, model: nn.Module, optimizer, workers) -> None:
    """Give the model, and the optimizer if there is one, what the checkpoint holds; each rank reads its share."""
    if optimizer is not None:
        make_state(model, optimizer)
    tensors, reader = tensors_of(model, optimizer), FileSystemReader(folder)
    if tensors.keys() - reader.read_metadata().state_dict_metadata.keys():
        raise RunError(
            f"{folder} has its 8-bit moments in other shards: resume it on as many processes, --fsdp, --hsdp as before"
        )
    dcp.load(tensors, storage_reader=reader, no_dist=workers.world == 1)


class Saver:
    """What a run saves on its way: checkpoint-STEP to go on from, of which the newest few are kept, and the `best` weights.

    As a context it ends when nothing is on its way any more. What befell a save in the background is raised by the next one, or
    there; `failed` tells sooner."""

    def __init__(self, config, model: nn.Module, optimizer, scaler, workers):
        self.folder, self.resume, self.keep = Path(config.output_dir), config.resume, config.save_total_limit
        self.takes_best = config.load_best_model_at_end
        self.model, self.optimizer, self.scaler, self.workers = model, optimizer, scaler, workers
        self.state = self.writing = self.thread = None
        if config.async_save:
            self.room, self.workers = {}, workers.beside()
            cuda = workers.device.type == "cuda"
            begin = partial(torch.cuda.set_device, workers.device) if cuda else None  # a new thread would begin on GPU 0
            self.thread = ThreadPoolExecutor(1, initializer=begin)

    def found(self) -> dict | None:
        """With --resume the state of the newest checkpoint, if there is one: the step, the log so far, ..."""
        for newest in checkpoints(self.folder)[-1:] if self.resume else []:
            self.state = read_state(newest, self.model)
            if self.takes_best and self.state["best"] < math.inf:
                self.read_best()  # now: found out at the end, it would have cost the run
        return self.state

    def restore(self) -> None:
        """Give weights, optimizer and scaler what stands in the checkpoint that was found."""
        if self.state:
            step = self.state["step"]
            restore(self.folder / f"checkpoint-{step}", self.model, self.optimizer if step else None, self.workers)
            self.scaler.load_state_dict(self.state["scaler"])
            self.workers.say(f"resumed after step {step}")
        elif self.resume:
            self.workers.say(f"{self.folder} holds no checkpoint: the run begins anew")

    def rehearse(self, state: dict) -> None:
        """Save before the first step, in full size: what cannot be saved is found out now, not after two days."""
        make_state(self.model, self.optimizer)
        self.save(state)
        self.wait()
        self.optimizer.state.clear()

    def save(self, state: dict) -> None:
        """A checkpoint, and when it is whole the oldest is removed."""
        self._write(self.folder / f"checkpoint-{state['step']}", state, self.optimizer, self.keep)

    def save_best(self, state: dict) -> None:
        self._write(self.folder / "best", state)

    def _write(self, folder: Path, state: dict, optimizer=None, keep: int = 0) -> None:
        self.wait()
        tensors = tensors_of(self.model, optimizer)
        if self.thread:
            tensors = self.copy(tensors)
        about = state | {"rows": list(state["rows"]), "scaler": self.scaler.state_dict()}

        def write():
            write_checkpoint(folder, tensors, about, self.workers)
            for old in checkpoints(self.folder)[:-keep] if keep and self.workers.first else []:
                try:
                    shutil.rmtree(old)
                except OSError as error:
                    raise RunError(f"could not remove {old}, the newer ones stand: {error.strerror or error}") from None

        if self.thread:
            self.writing = self.thread.submit(write)
        else:
            write()

    def copy(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors, or a rank's shards, as they are now, in the host's memory: the room of the first copy serves all. (PyTorch
        has a DefaultStager for this; that of 2.11 can be used once.)"""
        for name, tensor in tensors.items():
            if name in self.room:
                self.room[name].copy_(tensor)
            else:
                self.room[name] = tensor.to("cpu", copy=True)
        return {name: self.room[name] for name in tensors}

    @property
    def failed(self) -> bool:
        return self.writing is not None and self.writing.done() and self.writing.exception() is not None

    def wait(self) -> None:
        """Return when the save on its way is whole. Raises what befell it, RunError for a full disk."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.thread:
            self.thread.shutdown()  # waits
        if kind is None:  # or else the run ends for another reason, which is the one to be told
            self.wait()

    def read_best(self) -> dict:
        return read_state(self.folder / "best", self.model, "--load_best_model_at_end False ends the run with its last weights")

    def load_best(self, state: dict) -> None:
        if state["best"] == math.inf:
            return self.workers.say("no held-out loss was a number: the last weights are kept")
        best = self.read_best()
        restore(self.folder / "best", self.model, None, self.workers)
        about = f"their held-out loss of {best['best']:.4f} is the lowest"
        self.workers.say(f"the weights of step {best['step']} are taken: {about}")
