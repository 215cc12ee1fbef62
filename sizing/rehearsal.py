"""train.py watched: the run that memory.py predicts by rehearsing it, and what train.py says of its own memory."""

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import torch

import train
from generate import DTYPES
from helping.files import free_memory
from memory import Tracker, predict
from model import Llama, ModelConfig
from running.checkpoint import trained_weights
from running.reading import Data
from running.settings import check_processes
from running.workers import Workers, whole
from sizing.advice import explain_out_of_memory
from sizing.formula import formula
from sizing.gpu import GPU

ROWS = 3  # that are accumulated for more: a first, one of those between, a last


@dataclass
class Rehearsal:
    """A run for memory.py to watch: the same build, step and evaluation, on random weights and rows that cost the most,
    with every position supervised. The rows exist before it watches; the rest is made by `build()`."""

    config: train.TrainConfig
    sizes: ModelConfig
    device: torch.device
    gpu: GPU | None = None  # as on it, whose kernels keep other tensors than a CPU's
    supervised: int | None = None  # positions with a label, if that is known
    processes: int = 1
    documents: int = 1  # in the row, where flash attention takes them together: its backward has room for each
    borders: Sequence[int] = ()  # of the documents, where they are attended to one by one; if not given, the row is one

    def __post_init__(self):
        tokens = self.config.per_device_train_batch_size * self.config.model_max_length
        row, sdpa = torch.zeros(tokens, dtype=torch.int64), self.config.attention == "sdpa"
        half = train.computed_in(self.config, self.device) != torch.float32
        self.attention = ("varlen" if half and self.gpu.varlen else "one by one") if self.gpu and sdpa else self.config.attention
        borders = [*range(self.documents), tokens] if self.attention == "varlen" else self.borders or [0, tokens]
        self.row = {"tokens": row, "labels": row.clone(), "cu_seqlens": torch.tensor(borders, dtype=torch.int32)}

    def connect(self):
        check_processes(self.config, self.processes)
        self.workers = Workers(self.device, self.processes)
        self.shard = train.sharding(self.config, self.device, self.workers)

    def build(self):
        """(model, optimizer), and with them what `step` and `evaluate` need."""
        self.model = train.build(self.config, self.device, self.sizes, self.shard)
        for layer in self.model.layers:
            layer.attention.method = self.attention
        self.optimizer = train.make_optimizer(self.config, self.model)
        self.scaler, self.autocast = train.precision(self.config, self.device)
        self.parallel = train.in_parallel(self.config, self.model, self.workers)
        if self.config.optimizer_in_backward:
            train.step_in_backward(self.model, self.optimizer)
        self.model.train()
        return self.model, self.optimizer

    def step(self):
        rows = [self.row] * min(ROWS, self.config.gradient_accumulation_steps)
        train.training_step(self.config, self.parallel, self.optimizer, self.scaler, rows, 1, 1e-4, self.workers, self.autocast)

    def evaluate(self):
        train.evaluate(self.model, self, self.workers, self.autocast)

    def save(self):
        for weight in trained_weights(self.model).values():  # as save_final compares what it wrote
            whole(weight).to(train.computed_in(self.config, self.device))

    def __len__(self):  # the one row that evaluate() asks for, as of a PackedBatches
        return 1

    def batch(self, epoch: int, index: int):
        return self.row


def copied(config: train.TrainConfig, sizes: ModelConfig, gpu: GPU | None, processes: int = 1) -> int:
    """Bytes of the host's memory that --async_save takes in each process: weights that are trained and their moments, again."""
    terms = formula(sizes, dataclasses.replace(config, cpu_offload=False), gpu, processes)
    return terms["weights" if config.method == "full" else "adapters"][1] + terms["optimizer state"][1]


class Memory:
    """What memory.py says of this run: the peak predicted before it, measured in it, and why it ran out, if it did.

    On a GPU the allocator's own count is the measure; on a CPU the first two steps are run inside a tracker."""

    def __init__(self, config: train.TrainConfig, sizes: ModelConfig, data: Data, workers: Workers):
        device = workers.device
        dtype = next(name for name, dtype in DTYPES.items() if dtype == train.computed_in(config, device))
        self.config, self.sizes, self.workers = dataclasses.replace(config, dtype=dtype, compile=False), sizes, workers
        self.gpu = GPU.here(device) if device.type == "cuda" else None
        self.counted, self.line = Tracker(), None
        rows, sizes, tokens = data.batches.rows, data.batches.sizes, data.batches.row_tokens
        self.supervised = int(max(sum(data.batches.supervised[i] for i in row) for row in rows))
        self.documents = 1 + max(map(len, rows))  # the unused tail is one
        borders = (sorted({0, *accumulate(int(sizes[i]) for i in row), tokens}) for row in rows)
        self.borders = max(borders, key=lambda ends: sum((end - start) ** 2 for start, end in pairwise(ends)))

    def predict(self) -> str:
        """Rehearse the run on fake tensors. What cannot be rehearsed is said, and stops nothing."""
        config, processes = self.config, self.workers.world
        cpu = torch.device("cpu")
        run = Rehearsal(config, self.sizes, cpu, self.gpu, self.supervised, processes, self.documents, self.borders)
        try:
            self.line = predict(run)
        except RuntimeError as error:  # fake tensors of another PyTorch may know other operations
            return f"memory: not predicted, {str(error).splitlines()[0]}"
        highest = self.line.highest
        text = f"memory: {self.line.peak / 1e9:.3f} GB predicted at the peak, in the {highest.part}, {highest.name}"
        if self.gpu:
            needed, memory, where = self.line.reserved + self.gpu.context, self.gpu.memory, ""
            text += f"; {needed / 1e9:.2f} of {memory / 1e9:.2f} GB in nvidia-smi"
        else:  # which the processes on this machine share
            needed, memory = self.line.peak * int(os.environ.get("LOCAL_WORLD_SIZE", 1)), free_memory()
            where = f" in the {memory / 1e9:.2f} GB that are free here"
        if needed > memory:
            text += f"\nwarning: that does not fit{where}: {self.explained()}"
        if self.config.async_save:
            copy = copied(self.config, self.sizes, self.gpu, self.workers.world) / 1e9
            text += f"\nmemory: and {copy:.3f} GB of the host's, a copy from which checkpoints are written"
        return text

    def watched(self, turn: int, model: Llama, optimizer, micro_batches):
        """What to run a step in: in the first two turns on a CPU the tracker, told of what is there already."""
        if turn > 2 or self.workers.world > 1 or self.workers.device.type != "cpu":
            return contextlib.nullcontext()
        states = (x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor))
        for tensor in chain(model.parameters(), states, *(batch.values() for batch in micro_batches)):
            self.counted.watch(tensor)
        return self.counted

    def measured(self) -> str:
        measured, how = self.counted.peak, "counted in the first two steps"
        if self.gpu:
            measured, how = torch.cuda.max_memory_allocated(), f"measured ({torch.cuda.max_memory_reserved() / 1e9:.3f} reserved)"
        if not measured or not self.line:
            return ""
        error = self.line.peak / measured - 1
        return f"memory: a peak of {measured / 1e9:.3f} GB {how}, {self.line.peak / 1e9:.3f} predicted, {error:+z.1%} off"

    def explained(self, ran_out: bool = False) -> str:
        in_use, peak = None, self.line.peak if self.line else None
        if ran_out:
            in_use = torch.cuda.max_memory_allocated() if self.gpu else self.counted.live
        return explain_out_of_memory(self.sizes, self.config, self.gpu, self.workers.world, peak, in_use)
