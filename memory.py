"""Memory: what a training run will need, predicted by running its real step on tensors that have no numbers, and counting.

An activation is a tensor that forward leaves behind because backward will want it: the derivative of x * y needs x and y. Forward
piles them up layer by layer, and backward, which goes from the last layer to the first, takes them off the pile in the opposite
order while it adds gradients. So memory is highest somewhere around the turn, and the question is how high:

    peak = weights + adapters + optimizer state                  there from the first step on
         + activations of all layers                             (about 34 x T x dim + ... bytes a layer, see `formula`)
         + the loss's logits, or a block's backward              whichever is more, at the turn

Calculators guess these terms. Here nothing is guessed: PyTorch runs `build` and `training_step` of train.py on fake tensors,
which have shapes and storages but no numbers (7B takes a few seconds and no GPU), and a `Tracker` writes down the birth and the
death of every storage. What is alive is what is needed. Nothing has to be told which tensors are saved for backward: they are
alive. Beside it stands `formula`, the same in closed form, to be checked by hand; and, with --measure, what a GPU really took.

Two things shorten the work. The layers of a Llama are alike, so 4 and 8 of them are run and the rest follows by a straight line,
exact to the byte. And what a fake tensor cannot show of a GPU is modelled in named terms: cuBLAS's workspace, the scratch
of flash attention's backward, the caching allocator (its rules are replayed on the diary), the CUDA context.

GB are 10^9 bytes, GiB 2^30. With torch.compile, which fuses operations, the prediction is an upper bound.
"""

import argparse
import bisect
import json
import re
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# ---------------------------------------------------------------------------------------------------------------------
# The tracker


class Block:
    """One storage: its bytes, the phases in which it was born and died, and what it is, where that is known."""

    __slots__ = ("born", "bytes", "died", "kind")

    def __init__(self, size: int, born: str, kind: str | None = None):
        self.bytes, self.born, self.died, self.kind = size, born, None, kind


class Tracker(TorchDispatchMode):
    """Follows the birth and death of every storage while PyTorch works inside `with Tracker()`, on real tensors or fake ones.

    Every operation, autograd's in backward included, passes through `__torch_dispatch__`. The storages of what it returns are
    counted once each, however many views share them, until the last reference is gone. `live` and `peak` are bytes; the
    diary is what happened, in order: (1, block) a birth, (-1, block) a death, (0, (part, phase)) the beginning of a phase.
    Temporaries inside one operation are not seen; `scratch` has those known, {operation: function of its arguments -> bytes}."""

    def __init__(self, scratch: dict | None = None, supervised: int | None = None):
        super().__init__()
        self.live = self.peak = 0
        self.part = self.phase = ""
        self.diary: list[tuple] = []
        self.scratch, self.supervised = scratch or {}, supervised
        self._living: dict[int, tuple] = {}  # a storage's address -> (weak reference to it, its block)

    def begin(self, phase: str) -> None:
        self.phase = phase
        self.diary.append((0, (self.part, phase)))

    def watch(self, tensor: torch.Tensor, kind: str | None = None) -> None:
        """Count the tensor's storage from now on, if it is not counted yet; `kind` says what it is."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._living:
            block = Block(storage.nbytes(), self.phase)

            def gone(_):
                del self._living[key]
                self._died(block)

            self._living[key] = weakref.ref(storage, gone), block
            self._was_born(block)
        if kind:
            self._living[key][1].kind = kind

    def _was_born(self, block: Block) -> None:
        self.live += block.bytes
        self.peak = max(self.peak, self.live)
        self.diary.append((1, block))

    def _died(self, block: Block) -> None:
        block.died = self.phase
        self.live -= block.bytes
        self.diary.append((-1, block))

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = self._without_numbers(op, args)
        if result is None:
            result = op(*args, **(kwargs or {}))
        if not op.is_view:  # a view brings no storage of its own
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                    self.watch(tensor)
        if op.name() in self.scratch:
            block = Block(self.scratch[op.name()](*args), self.phase, "kernel scratch")
            self._was_born(block)
            self._died(block)
        return result

    def _without_numbers(self, op, args):
        """What fake tensors are asked and cannot know. A number: finite, not zero where it counts tokens. How many positions
        have a label: all, the most it can be, or as many as the caller knows of."""
        number = op is torch.ops.aten._local_scalar_dense.default
        masked = op is torch.ops.aten.index.Tensor and args[1][0].dtype == torch.bool
        if not (number or masked) or not any(isinstance(x, FakeTensor) for x in tree_leaves(args)):
            return None
        if number:
            return {torch.bool: True, torch.int64: 1}.get(args[0].dtype, 0.0)
        return args[0][: self.supervised].clone()


def follow(recorder, model, optimizer) -> None:
    """Have the phases of every step recorded, layer by layer, and gradients and optimizer state known as such.

    Tensor hooks are called when a gradient is complete: the one of block i's output, where the backward of block i begins."""

    def forward_begins(name):
        def hook(*_):
            if not recorder.phase.startswith("backward"):  # there, gradient checkpointing computes the block again
                recorder.begin(name)

        return hook

    def mark_backward(tensor, name):
        if tensor.requires_grad:
            tensor.register_hook(lambda grad: recorder.begin(name))

    def forward_ends(i):
        def hook(_, args, output):
            if not recorder.phase.startswith("backward"):
                mark_backward(output, f"backward {i}")
                if i == 0:
                    mark_backward(args[0], "backward embedding")

        return hook

    def stepped(*_):
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    recorder.watch(value, "optimizer state")
        recorder.begin("between steps")

    model.register_forward_pre_hook(forward_begins("forward embedding"))
    for i, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(forward_begins(f"forward {i}"))
        layer.register_forward_hook(forward_ends(i))
    model.norm.register_forward_pre_hook(forward_begins("loss"))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(lambda weight: recorder.watch(weight.grad, "gradients"))
    optimizer.register_step_pre_hook(lambda *_: recorder.begin("optimizer"))
    optimizer.register_step_post_hook(stepped)


# ---------------------------------------------------------------------------------------------------------------------
# Reading the diary


@dataclass
class Phase:
    """A stretch of a run, and the bytes of each kind at its start, at its own peak, and at its end."""

    part: str  # load, first step, second step, evaluation, save
    name: str  # forward 0, loss, backward 0, optimizer, ...
    start: Counter
    peak: Counter
    end: Counter

    @property
    def layer(self) -> int | None:
        return int(self.name.split()[-1]) if self.name[-1].isdigit() else None


@dataclass
class Timeline:
    phases: list[Phase]
    tails: int = 0  # bytes that CUDA's allocator hands out beyond what was asked, at the peak
    reserved: int | None = None  # what it has taken from the GPU in all

    def highest(self, *parts: str) -> Phase:
        chosen = [phase for phase in self.phases if not parts or phase.part in parts]
        return max(chosen, key=lambda phase: phase.peak.total())

    @property
    def peak(self) -> int:
        return self.highest().peak.total() + self.tails


def timeline(diary: list[tuple], gpu=None) -> Timeline:
    """The diary as phases. For a GPU every size is rounded as its allocator does, which is replayed beside it."""
    allocator = CachingAllocator() if gpu else None
    phases, live, total, peak, tails = [], Counter(), 0, 0, 0
    for what, block in diary:
        if what == 0:
            if phases:
                phases[-1].end = live.copy()
            phases.append(Phase(*block, live.copy(), live.copy(), live.copy()))
            start = total
            continue
        size = -(-block.bytes // 512) * 512 if gpu else block.bytes
        live[kind_of(block)] += what * size
        total += what * size
        if allocator:
            allocator.allocate(block) if what == 1 else allocator.free(block)
            if total > peak:
                peak, tails = total, allocator.allocated - total
        if total > start:
            start = total
            phases[-1].peak = live.copy()
    phases[-1].end = live.copy()
    return Timeline([p for p in phases if p.name != "end"], tails, allocator and allocator.reserved)


def kind_of(block: Block) -> str:
    """What is not known as weight, gradient, ... is an activation if forward left it behind, else it came and went."""
    if block.kind:
        return block.kind
    if block.born == "loss":
        return "logits and loss"
    left = block.born.startswith("forward") and block.died != block.born
    return "activations" if left else "temporary"


def stretch(few: Timeline, more: Timeline, layers: tuple[int, int], n: int) -> Timeline:
    """The timeline of n alike layers from those of two shallower models: every figure is a straight line in the depth, and
    along the middle layers one in their number. What the allocator reserves is that only to about 4 %."""
    a, b = layers
    rest = iter([p for p in few.phases if p.layer is None or p.layer in (0, 1, a - 1)])
    phases = []

    def line(low: Counter, high: Counter, next_high: Counter | None = None, i: int = 1) -> Counter:
        made = Counter()
        for kind in low.keys() | high.keys():
            along = (i - 1) * (next_high[kind] - high[kind]) if next_high else 0
            made[kind] = high[kind] + (n - b) * (high[kind] - low[kind]) // (b - a) + along
        return made

    i = 0
    while i < len(more.phases):
        phase = more.phases[i]
        if phase.layer in (None, 0, b - 1):
            low = next(rest)
            name = phase.name.replace(str(b - 1), str(n - 1)) if phase.layer else phase.name
            phases.append(
                Phase(phase.part, name, line(low.start, phase.start), line(low.peak, phase.peak), line(low.end, phase.end))
            )
            i += 1
            continue
        group = more.phases[i : i + b - 2]  # the middle layers, on the way up or down
        i, low, upward = i + b - 2, next(rest), phase.layer == 1
        first, second = (group[0], group[1]) if upward else (group[-1], group[-2])
        for layer in range(1, n - 1) if upward else range(n - 2, 0, -1):
            ends = [line(getattr(low, end), getattr(first, end), getattr(second, end), layer) for end in ("start", "peak", "end")]
            phases.append(Phase(phase.part, f"{phase.name.split()[0]} {layer}", *ends))

    def extended(low, high):
        return high + (n - b) * (high - low) // (b - a)

    tails = max(0, extended(few.tails, more.tails))
    made = Timeline(phases, tails)
    if more.reserved is not None:
        made.reserved = max(extended(few.reserved, more.reserved), made.peak)
    return made


# ---------------------------------------------------------------------------------------------------------------------
# What a GPU adds


class CachingAllocator:
    """PyTorch's CUDA allocator, its rules without its memory (c10/cuda/CUDACachingAllocator.cpp).

    It takes segments from the GPU (2 MiB for what is at most 1 MiB, 20 MiB below 10 MiB, else the size rounded up to 2 MiB), cuts
    blocks of multiples of 512 bytes out of them, best fit first, joins free neighbours, and gives nothing back. A rest of
    up to 1 MiB is not cut off a large block, so that is allocated as well."""

    def __init__(self):
        self.allocated = self.reserved = 0
        self.free_blocks = {True: [], False: []}  # small pool?: sorted (size, number)
        self.pieces = {}  # number -> [size, free, number before, number after, small]
        self.given = {}  # a tracker's block -> number
        self.next = 0

    def _new(self, size, before, after, small) -> int:
        self.next += 1
        self.pieces[self.next] = [size, False, before, after, small]
        return self.next

    def allocate(self, block) -> None:
        size = max(512, -(-block.bytes // 512) * 512)
        small = size <= 2**20
        pool = self.free_blocks[small]
        place = bisect.bisect_left(pool, (size, 0))
        if place < len(pool):
            _, number = pool.pop(place)
        else:
            segment = 2**21 if small else 20 * 2**20 if size < 10 * 2**20 else -(-size // 2**21) * 2**21
            number = self._new(segment, None, None, small)
            self.reserved += segment
        piece = self.pieces[number]
        rest = piece[0] - size
        if rest >= 512 if small else rest > 2**20:
            after = self._new(rest, number, piece[3], small)
            if piece[3]:
                self.pieces[piece[3]][2] = after
            piece[0], piece[3] = size, after
            self._release(after)
        piece[1] = False
        self.given[block] = number
        self.allocated += piece[0]

    def free(self, block) -> None:
        number = self.given.pop(block)
        self.allocated -= self.pieces[number][0]
        piece = self.pieces[number]
        for side in (2, 3):
            neighbour = piece[side]
            if neighbour and self.pieces[neighbour][1]:
                size, _, *around, _ = self.pieces.pop(neighbour)
                pool = self.free_blocks[piece[4]]
                del pool[bisect.bisect_left(pool, (size, neighbour))]
                piece[0] += size
                piece[side] = around[side - 2]
                if piece[side]:
                    self.pieces[piece[side]][5 - side] = number
        self._release(number)

    def _release(self, number: int) -> None:
        piece = self.pieces[number]
        piece[1] = True
        bisect.insort(self.free_blocks[piece[4]], (piece[0], number))


@dataclass(frozen=True)
class GPU:
    name: str
    memory: int  # bytes that PyTorch finds (total_memory), less than the figure on the box
    bf16: bool = True
    context: int = 500_000_000  # what CUDA and its kernels take beside PyTorch's tensors; differs by driver, +- 0.1 GB
    workspace: int = 2 * 2**22 + 16 * 2**13  # cuBLAS, for each thread that multiplies: forward's and backward's

    @property
    def dtype(self) -> str:
        return "bf16" if self.bf16 else "fp16"


def _gib(x: float) -> int:
    return int(x * 2**30)


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("t4", _gib(14.56), bf16=False, context=350_000_000),
        GPU("3090", _gib(23.69), context=400_000_000),
        GPU("4090", _gib(23.64), context=450_000_000),
        GPU("a100-40", _gib(39.39)),
        GPU("a100-80", _gib(79.15)),
        GPU("h100", _gib(79.10), context=600_000_000, workspace=2**25),
        GPU("h200", _gib(139.72), context=600_000_000, workspace=2**25),
    )
}


def find_gpu(name: str) -> GPU:
    """One of GPUS, or any size: 80GB. Raises ValueError naming the known ones."""
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)GB", name, re.IGNORECASE):
        return GPU(name, int(float(size[1]) * 1e9))
    raise ValueError(f"unknown GPU {name!r}: known are {', '.join(GPUS)}, or a size such as 80GB")


def flash_scratch(grad, q, *_) -> int:
    """Bytes that flash attention's backward takes for itself: dQ is summed in fp32, and one fp32 number a row, T + 128 rows
    (FlashAttention-2's varlen backward)."""
    tokens, heads, size = q.shape
    return (tokens + 128) * heads * (-(-size // 32) * 32 + 1) * 4


SCRATCH = {"torch_attn::_varlen_attn_backward": flash_scratch}


# ---------------------------------------------------------------------------------------------------------------------
# Prediction and measurement


def watch(run, dry: bool, gpu: GPU | None = None, nproc: int = 1) -> Tracker:
    """Build the run and take two steps, an evaluation and a save of it, inside a tracker. dry: on fake tensors.

    nproc > 1: with the buffers in which DDP collects the gradients, as large as these."""
    fake = FakeTensorMode(allow_non_fake_inputs=True) if dry else nullcontext()
    with fake, Tracker(SCRATCH if gpu else {}, run.supervised if dry else None) as tracker:
        tracker.part = "load"
        tracker.begin("load")
        model, optimizer = run.build()
        for name, weight in model.named_parameters():
            tracker.watch(weight, "adapters" if "lora_" in name else "weights")
        for tensor in run.row.values():
            tracker.watch(tensor, "batch")
        for _ in range(2 if gpu else 0):
            tracker._was_born(Block(gpu.workspace, "load", "cuBLAS workspace"))
        if nproc > 1:
            trained = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
            tracker._was_born(Block(trained, "load", "DDP buckets"))
        follow(tracker, model, optimizer)
        for tracker.part in ("first step", "second step"):
            run.step()
        for tracker.part, work in (("evaluation", run.evaluate), ("save", run.save)):
            tracker.begin(tracker.part)
            work()
        tracker.begin("end")
    return tracker


FEW = (4, 8)


def predict(rehearse, n_layers: int, gpu: GPU | None = None, nproc: int = 1) -> Timeline:
    """The timeline of a run on fake tensors. rehearse(layers) -> the run with that many layers: `build()` -> (model,
    optimizer), `step()`, `evaluate()`, `save()`, and `row`, the tensors of a micro-batch. With a GPU: as on that GPU."""

    def of(layers):
        return timeline(watch(rehearse(layers), True, gpu, nproc).diary, gpu)

    return of(n_layers) if n_layers <= FEW[1] else stretch(*map(of, FEW), FEW, n_layers)


class Gauge:
    """What `follow` reports to on a GPU: every phase with the allocator's own figures, which are free to ask for."""

    def __init__(self):
        self.part = self.phase = ""
        self.phases: list[Phase] = []

    def begin(self, phase: str) -> None:
        now = Counter(allocated=torch.cuda.memory_allocated())
        if self.phases:
            self.phases[-1].peak, self.phases[-1].end = Counter(allocated=torch.cuda.max_memory_allocated()), now
        torch.cuda.reset_peak_memory_stats()
        self.phase = phase
        self.phases.append(Phase(self.part, phase, now, now, now))

    def watch(self, tensor, kind=None) -> None:
        pass  # the allocator knows sizes, not kinds


def measure(run, device: torch.device) -> Timeline:
    """The same run on real tensors: counted by the tracker on a CPU, by the allocator on a GPU."""
    if device.type != "cuda":
        return timeline(watch(run, False).diary)
    gauge = Gauge()
    torch.cuda.empty_cache()
    gauge.part = "load"
    gauge.begin("load")
    follow(gauge, *run.build())
    reserved = 0
    for gauge.part, work in (
        ("first step", run.step),
        ("second step", run.step),
        ("evaluation", run.evaluate),
        ("save", run.save),
    ):
        gauge.begin(gauge.part)
        work()
        reserved = max(reserved, torch.cuda.memory_reserved())  # it is never given back by itself
    gauge.begin("end")
    return Timeline(gauge.phases[:-1], reserved=reserved)


# ---------------------------------------------------------------------------------------------------------------------
# The closed form


def linears(s) -> dict[str, tuple[int, int]]:
    """(out, in) of the seven linears of a block."""
    c, f, kv = s.dim, s.hidden_dim, s.n_kv_heads * s.dim // s.n_heads
    return {"wq": (c, c), "wk": (kv, c), "wv": (kv, c), "wo": (c, c), "w1": (f, c), "w2": (c, f), "w3": (f, c)}


def formula(s, flags, b: int, gpu: GPU | None = None, nproc: int = 1) -> dict[str, tuple[str, int]]:
    """The run in closed form: name -> (arithmetic, bytes). s: the model's sizes; flags: train.py's; b: bytes of a number in the
    computation, 2 or 4.

    T tokens in a row, n of them in a chunk of the loss, C dim, F hidden_dim, V vocabulary, H heads, L layers, r LoRA's rank."""
    T, C, F, V = flags.per_device_train_batch_size * flags.model_max_length, s.dim, s.hidden_dim, s.vocab_size
    H, K, L, r = s.n_heads, s.n_kv_heads * s.dim // s.n_heads, s.n_layers, flags.lora_rank
    full, again, n = flags.method == "full", flags.gradient_checkpointing, min(T, 1024)
    masters = full and b == 2 and not flags.pure_bf16  # fp32 weights, cast by autocast where they are used
    S = 4 if masters else b  # bytes of a number in the residual stream, which autocast leaves in fp32
    block = sum(out * inn for out, inn in linears(s).values())
    rest = 2 * V * C + (2 * L + 1) * C
    terms = {}

    # What stays from the first step on.
    if flags.quantize == "nf4":
        packed = sum(m // 2 + m // 64 + 4 * (-(-m // 2**14) + 1) for m in (o * i for o, i in linears(s).values()))
        terms["weights"] = f"{L} x {block:,} x 4.127 bits + {rest:,} x {b} bytes", L * packed + rest * b
    elif flags.quantize == "int8":
        packed = block + 4 * sum(out for out, _ in linears(s).values())
        terms["weights"] = f"{L} x {block:,} x 1 byte + {rest:,} x {b} bytes", L * packed + rest * b
    else:
        terms["weights"] = f"{L * block + rest:,} x {4 if masters else b} bytes", (L * block + rest) * (4 if masters else b)
    every = linears(s) | {"tok_embeddings": (C, V), "output": (V, C)}
    chosen = {x for x in every if x in flags.lora_targets or ("all-linear" in flags.lora_targets and x in linears(s))}
    thin = [(r * size, L if x in linears(s) else 1) for x in sorted(chosen) for size in every[x]]  # A's and B's numbers, times
    trained = L * block + rest if full else sum(size * times for size, times in thin)
    g = 2 if full and flags.pure_bf16 else 4
    terms["adapters"] = ("none", 0) if full else (f"{trained:,} x 4 bytes", trained * 4)
    terms["gradients"] = f"{trained:,} x {g} bytes", trained * g
    if flags.optim == "adamw_8bit":  # fp32 for tensors of fewer than 4,096 numbers
        tiny = (rest - 2 * V * C if C < 4096 else 0) if full else sum(size * times for size, times in thin if size < 4096)
        terms["optimizer state"] = f"{trained:,} x 2 x (1 + 4/256) bytes", round((trained - tiny) * 2 * 65 / 64 + tiny * 8)
    else:
        terms["optimizer state"] = f"{trained:,} x 8 bytes", trained * 8
    if gpu:
        terms["cuBLAS workspace"] = f"2 threads x {gpu.workspace:,} bytes", 2 * gpu.workspace
    if nproc > 1:
        terms["DDP buckets"] = f"a second copy of the gradients, {trained:,} x {g} bytes", trained * g

    # What forward leaves behind in a block: the norms' inputs in fp32 and outputs, q, k, v and attention's result, four
    # tensors of the feed-forward layer. A weight that is trained needs the input it was multiplied with, a frozen one does not.
    norms = bool(chosen & {"wq", "wk", "wv"} or full) + bool(chosen & {"w1", "w3"} or full)
    wide = 3 + bool("w2" in chosen or full)
    if masters:
        per_token = 4 * 4 + 5 * 2  # two norms' inputs and results in fp32; q, k, v, w1, w3 are each given a bf16 copy
    else:
        per_token = 2 * (4 if b == 2 else b) + (2 * b if full else 0) + norms * b
    kept = f"T x C x {per_token}"
    if flags.attention == "textbook":
        attention = f"T x 4 C x {b} + H x T x T x {6 if b == 2 else 4} + T x T"
        size = T * 4 * C * b + H * T * T * (6 if b == 2 else 4) + T * T
    elif gpu and b == 2:
        size, attention = T * 4 * C * b + T * H * 4, f"T x 4 C x {b} + T x H x 4"
    else:  # the CPU's way joins its documents' results: one tensor more, and k and v are not repeated
        joined = 2 + bool("wo" in chosen or full)
        size, attention = T * (joined * C + 2 * K) * b + T * H * 4, f"T x ({joined} C + 2 K) x {b} + T x H x 4"
    size += T * C * per_token + T * wide * F * b + T * 8
    kept += f" + {attention} + T x {wide} F x {b} + T x 8"
    if not full:
        a = r * sum(sum(every[x]) for x in chosen & linears(s).keys())
        size += T * r * b * len(chosen & linears(s).keys()) + (a * b if b == 2 else 0)
        kept += f" + adapters: T x r x {len(chosen & linears(s).keys())} x {b}" + (f", cast {a:,} x 2" if b == 2 else "")
    casts = block * 2 if masters else 0
    kept += f" + autocast's copies of the weights, {block:,} x 2" if masters else ""
    first = size + casts - (0 if full or "tok_embeddings" in chosen else T * C * 4 + T * 4)
    middle = T * C * S + casts if again else size + casts
    if again:
        first, kept_text = middle, f"its input, T x C x {S}" + (f" + autocast's copies, {block:,} x 2" if masters else "")
    else:
        kept_text = kept
    terms["activations, first layer"] = kept_text, first
    terms["activations, middle layers"] = f"{max(0, L - 2)} x {middle:,}", max(0, L - 2) * middle
    terms["activations, last layer"] = kept_text, middle if L > 1 else 0
    activations = first + (L - 1) * middle

    # The turn: the last norm and the loss, a chunk of n positions at a time, each computed again in backward.
    several = n < T
    copy = 4 if S == 2 else 0  # the norm's fp32 copy of its input, when that was not fp32 (then the input itself is freed)
    held = T * C * (copy + (S if full else 0) + S + (S if several else 0) - (S if S == 2 else 0))
    logits = 3 * n * V * 4
    head = V * C * 2 + n * C * 2 if masters else 0
    before = V * C * (2 if masters else g) if full and several else 0
    moments = {"3 x n x V x 4": held + logits + head + before}
    if S == 2:
        moments["the norm's backward, T x C x 22"] = T * C * 22
    if masters:
        moments["the head's gradient, V x C x (2 + 4)"] = held + V * C * 6
    elif full:
        sums = 3 * V * C * g + n * C * b - (T * C * S if 2 * n >= T else 0)  # of the chunks' gradients
        moments["the head's gradients"] = held + (sums if several else V * C * g + n * V * b + T * C * b)
    if masters and again:  # autocast's copies are let go at the end of forward, before that backward
        moments = {k: v - L * casts for k, v in moments.items()}
        moments["2 x n x V x 4 in forward"] = 3 * T * C * 4 + V * C * 2 + 2 * n * V * 4
    name, loss = max(moments.items(), key=lambda item: item[1])
    terms["logits and loss"] = f"{name} + the norm's and the loss's inputs" if "x 4" in name else name, loss

    # A block's backward: two gradients of the feed-forward layer's width, a weight's gradient or a weight turned back.
    mixed, weight = T * F * b, C * F
    if full:
        backward = {"2 x T x F x b + C x F x 2": 2 * mixed + weight * (2 if b == 2 else 4)}
        if masters and again:
            backward["C x F x 4 + T x C x 2"] = weight * 4 + T * C * 2
        elif b == 2:
            gone = size + casts
            backward["its gradients, its activations gone"] = block * g - gone + T * C * (28 if masters else 24)
    else:
        packed = {"none": 0, "nf4": b, "int8": 4 + (b if b == 2 else 0)}[flags.quantize] * weight
        backward = {"2 x T x F x b": 2 * mixed} if "w2" in chosen else {"3 x T x F x b": 3 * mixed}
        if packed:
            one = weight * b
            backward |= {"T x F x b + a weight turned back": mixed + one, "a weight turned back": packed + again * 2 * T * C * b}
            backward["a weight turned back + 3 x T x C x b"] = one + 3 * T * C * b * again
    if flags.attention == "textbook":
        backward["H x T x T x 4"] = H * T * T * 4 + T * C * (2 if b == 2 else 8)
    name, extra = max(backward.items(), key=lambda item: item[1])
    if again:
        name, extra = f"the block once more, {size + casts:,}, + {name}", extra + size + casts - (T * C * 4 if S == 4 else 0)
    terms["a block's backward"] = name, extra
    largest = min(2**24, max(V * C, C * F) if full else max(size for size, _ in thin))  # AdamW8bit works on 2^24 at a time
    work = largest * ((32 if g == 2 else 28) + 8 / 256) if flags.optim == "adamw_8bit" else 0
    terms["optimizer's work"] = (f"{largest:,} x {8 if g == 2 else 7} fp32 numbers" if work else "none, it is fused"), round(work)

    # The peak: the highest of the moments at which it can be.
    static = sum(terms[x][1] for x in ("weights", "adapters", "optimizer state", "cuBLAS workspace", "DDP buckets") if x in terms)
    static += 16 * T
    gradients, stream = trained * g, T * C * S
    earlier = gradients if flags.gradient_accumulation_steps > 1 else 0
    inputs = stream if full and S == 4 else 0  # what the embedding gave out, if it is still needed
    released = L * casts if again else 0
    peaks = {
        "loss": static + earlier + activations + stream + loss,
        f"backward {L - 1}": static + (earlier or (V * C * g if full else 0)) + activations - released + inputs + stream + extra,
        "optimizer": static + gradients + work,
    }
    if full:
        peaks["backward 0"] = static + gradients - (block + V * C) * g + first - casts * again + inputs + stream + extra
        peaks["backward embedding"] = static + gradients + stream + (V * C * g if earlier else 0)
    name, peak = max(peaks.items(), key=lambda item: item[1])
    return terms | {"allocated peak": (f"in the phase {name}", round(peak))}


def simulated(line: Timeline, n_layers: int) -> dict[str, int]:
    """The formula's terms as they were counted, in the second step."""
    phases = {phase.name: phase for phase in line.phases if phase.part == "second step"}
    top = line.highest().peak

    def kept(i):
        phase = phases[f"forward {i}"]
        return phase.end.total() - phase.start.total()

    def rise(name):
        return phases[name].peak.total() - phases[name].start.total()

    stays = {kind: top[kind] for kind in ("weights", "adapters")}
    return (
        stays
        | {kind: top[kind] for kind in ("cuBLAS workspace", "DDP buckets") if kind in top}
        | {
            "gradients": max(phase.peak["gradients"] for phase in phases.values()),
            "optimizer state": phases["between steps"].end["optimizer state"],
            "activations, first layer": kept(0),
            "activations, middle layers": sum(kept(i) for i in range(1, n_layers - 1)),
            "activations, last layer": kept(n_layers - 1) if n_layers > 1 else 0,
            "logits and loss": rise("loss"),
            "a block's backward": rise(f"backward {n_layers - 1}"),
            "optimizer's work": rise("optimizer"),
            "allocated peak": line.peak - line.tails,
        }
    )


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def gb(size) -> str:
    return "" if size is None else f"{size / 1e9:,.3f}"


def breakdown(closed: dict, counted: dict, measured: dict | None, line: Timeline, gpu: GPU | None, real=None) -> dict:
    """{term: {arithmetic, formula, simulated, measured}} in bytes, None where not known; the totals last."""
    rows = {}
    for name, (arithmetic, size) in closed.items():
        seen = [(column or {}).get(name) for column in (counted, measured)]
        rows[name] = {"arithmetic": arithmetic, "formula": size, "simulated": seen[0], "measured": seen[1]}
    if gpu:
        allocated = rows.pop("allocated peak")
        rows["allocator's rounding"] = {"arithmetic": "rests of up to 1 MiB", "formula": None, "simulated": line.tails}
        allocated["simulated"] = line.peak
        rows["allocated peak"] = allocated
        taken = real.reserved if real else None
        rows["reserved"] = {"arithmetic": "segments of the allocator", "formula": None, "simulated": line.reserved}
        rows["reserved"]["measured"] = taken
        rows["CUDA context"] = {"arithmetic": "+- 0.1 GB", "formula": gpu.context, "simulated": gpu.context}
        rows["nvidia-smi"] = {"arithmetic": "reserved + context", "formula": None, "simulated": line.reserved + gpu.context}
    return rows


def show_breakdown(rows: dict) -> None:
    print(f"{'GB (10^9 bytes)':30}{'formula':>10}{'simulated':>11}{'measured':>10}   as")
    for name, row in rows.items():
        total = name in ("allocated peak", "reserved", "nvidia-smi")
        size = row.get("measured") or row.get("simulated") or row["formula"]
        print(
            f"{name:30}{gb(row['formula']):>10}{gb(row.get('simulated')):>11}{gb(row.get('measured')):>10}   "
            + (f"{size / 2**30:.2f} GiB; " if total else "")
            + row["arithmetic"]
        )


def layer_rows(line: Timeline) -> list[dict]:
    """What each layer keeps in forward; what its backward needs on top, adds (gradients) and frees. Second step, bytes."""
    rows = {}
    for phase in line.phases:
        if phase.part != "second step" or phase.layer is None:
            continue
        row = rows.setdefault(phase.layer, {"layer": phase.layer})
        change = phase.end.total() - phase.start.total()
        if phase.name.startswith("forward"):
            row |= {"forward_kept": change, "forward_peak": phase.peak.total() - phase.start.total()}
        else:
            added = phase.end["gradients"] - phase.start["gradients"]
            row |= {"backward_peak": phase.peak.total() - phase.start.total(), "backward_added": added}
            row |= {"backward_freed": added - change}
    return [rows[i] for i in sorted(rows)]


def show_layers(rows: list[dict]) -> None:
    names = [name for name in rows[0] if name != "layer"]
    print(f"\n{'GB per layer':14}" + "".join(f"{name.replace('_', ' '):>16}" for name in names))
    alike = None
    for row in rows:
        values = [row[name] for name in names]
        if values != alike:  # layers that are like the one before are not repeated
            print(f"layer {row['layer']:<8}" + "".join(f"{gb(value):>16}" for value in values))
        elif row["layer"] + 1 == len(rows) or [rows[row["layer"] + 1][name] for name in names] != values:
            print(f"  to {row['layer']:<9}" + f"{'the same':>16}")
        alike = values


def show_timeline(line: Timeline) -> None:
    print(f"\n{'GB over time':38}{'start':>10}{'peak':>10}{'end':>10}")
    top, folded = line.highest(), [p for p in line.phases if p.layer in (None, 0) or p.layer == len(layer_rows(line)) - 1]
    for phase in folded:
        mark = "  <- the peak" if phase is top else ""
        sizes = "".join(f"{gb(x.total()):>10}" for x in (phase.start, phase.peak, phase.end))
        print(f"{phase.part + ', ' + phase.name:38}{sizes}{mark}")


def plot(line: Timeline, path: str, gpu: GPU | None, title: str) -> None:
    """A stacked area over the run's phases, and the GPU's memory as a line. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    from matplotlib import pyplot

    kinds = [
        "weights",
        "adapters",
        "optimizer state",
        "gradients",
        "activations",
        "logits and loss",
        "temporary",
        "cuBLAS workspace",
    ]
    moments = [moment for phase in line.phases for moment in (phase.start, phase.peak, phase.end)]
    figure, axes = pyplot.subplots(figsize=(11, 5))
    axes.stackplot(range(len(moments)), [[moment[kind] / 1e9 for moment in moments] for kind in kinds], labels=kinds)
    parts = [phase.part for phase in line.phases]
    for part in dict.fromkeys(parts):
        axes.axvline(3 * parts.index(part), color="grey", linewidth=0.5)
        axes.text(3 * parts.index(part), axes.get_ylim()[1], f" {part}", rotation=90, va="top", fontsize=8)
    if gpu and gpu.memory:
        axes.axhline((gpu.memory - gpu.context) / 1e9, color="red", label=f"{gpu.name}, less the CUDA context")
    axes.set(xlabel="time, in phases", ylabel="GB allocated", title=title)
    axes.set_xticks([])
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# Will it fit, and if not, what would


def cheaper(flags) -> list[tuple[str, dict]]:
    """Changes that save memory, the cheapest first: (what it is and costs, the flags it changes)."""
    ways = []
    if not flags.gradient_checkpointing:
        ways.append(("--gradient_checkpointing, a third more time", {"gradient_checkpointing": True}))
    if flags.method == "full" and flags.optim == "adamw":
        ways.append(("--optim adamw_8bit, the same losses to rounding", {"optim": "adamw_8bit"}))
    if flags.method == "full" and not flags.pure_bf16:
        both = {"optim": "adamw_8bit", "pure_bf16": True}
        ways.append(("--pure_bf16 --optim adamw_8bit, no fp32 weights", both))
    if flags.method == "lora" and flags.quantize != "nf4":
        ways.append(("--method qlora, 4-bit weights, a little slower", {"method": "qlora", "quantize": "nf4"}))
    if flags.per_device_train_batch_size > 1:
        half = flags.per_device_train_batch_size // 2
        fewer = {"per_device_train_batch_size": half, "gradient_accumulation_steps": flags.gradient_accumulation_steps * 2}
        ways.append((f"--per_device_train_batch_size {half} and twice the accumulation, the same steps", fewer))
    elif flags.model_max_length > 256:
        half = flags.model_max_length // 2
        ways.append((f"--model_max_length {half}, longer documents are cut", {"model_max_length": half}))
    if flags.method == "full":
        lora = {"method": "lora", "pure_bf16": False, "optim": "adamw"}
        ways.append(("--method lora, other weights stay as they are", lora))
        ways.append(("--method qlora", lora | {"method": "qlora", "quantize": "nf4"}))
    return ways


def needed(s, flags, b: int, gpu: GPU, nproc: int = 1) -> int:
    """Bytes by the formula: the allocated peak and the context."""
    return formula(s, flags, b, gpu, nproc)["allocated peak"][1] + gpu.context


def sharded(s, flags, b: int, gpu: GPU, nproc: int) -> int:
    """The formula with FSDP over nproc GPUs: what stays is divided, and two layers (this and the next) are gathered whole."""
    terms = formula(s, flags, b, gpu)
    stays = sum(terms[name][1] for name in ("weights", "adapters", "gradients", "optimizer state"))
    one = terms["weights"][1] / s.n_layers  # a little more than a layer
    return round(needed(s, flags, b, gpu) - stays * (1 - 1 / nproc) + 2 * one)


def advice(s, flags, b: int, gpu: GPU, nproc: int) -> list[dict]:
    """Each change by itself and then all so far together, until it fits; then more GPUs. [{change, bytes, fits}]"""
    found = []

    def add(change, size):
        found.append({"change": change, "bytes": size, "fits": size <= gpu.memory})
        return found[-1]["fits"]

    for change, new in cheaper(flags):
        add(change, needed(s, replace(flags, **new), b, gpu, nproc))
    if not any(way["fits"] for way in found):
        together, words = flags, []
        while ways := cheaper(together):
            together = replace(together, **ways[0][1])
            words.append(ways[0][0].split(",")[0])
            size = needed(s, together, b, gpu, nproc)
            if size <= gpu.memory or (len(ways) == 1 and together.model_max_length <= 512):
                add(" ".join(words), size)
                break
        if size > gpu.memory:
            for count in sorted({nproc, 2, 4, 8} - {1}):
                size = sharded(s, together, b, gpu, count)
                if add(f"the same, sharded over {count} GPUs with FSDP, which train.py cannot do yet", size):
                    break
    return found


def explain_out_of_memory(terms: dict, peak: int, capacity: int, in_use: int, ways: list[dict]) -> str:
    """What to say when memory ran out: what was predicted, what was in use (bytes), and what would fit."""
    largest = sorted(((size, name) for name, size in terms.items() if size and name != "allocated peak"), reverse=True)[:4]
    lines = [
        f"out of memory: {in_use / 1e9:.2f} of {capacity / 1e9:.2f} GB were in use, a peak of {peak / 1e9:.2f} GB was predicted, "
        "most of it " + ", ".join(f"{name} {size / 1e9:.2f}" for size, name in largest)
    ]
    lines += [f"  {way['change']}: {way['bytes'] / 1e9:.2f} GB" + (", fits" if way["fits"] else "") for way in ways]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The program. From here on train.py is known: it hands over its own build and step.


def rehearsals(flags, sizes, gpu):
    """layers -> train.py's run with that many, on the CPU's fake tensors, with CUDA's attention if it is for a GPU."""
    import train

    varlen = gpu is not None and flags.attention == "sdpa" and flags.dtype != "fp32"
    return lambda layers: train.Rehearsal(flags, replace(sizes, n_layers=layers), torch.device("cpu"), varlen=varlen)


def width(flags) -> int:
    return 4 if flags.dtype == "fp32" else 2


GENERIC = GPU("a GPU", 0)


def grid(sizes, make, gpu: GPU, nproc: int) -> list[dict]:
    """full, LoRA and QLoRA at 1k to 8k tokens with checkpointing, by the formula, and which GPUs hold each."""
    rows = []
    for method in ("full", "lora", "qlora"):
        for tokens in (1024, 2048, 4096, 8192):
            batch = max(1, tokens // sizes.max_seq_len)
            more = {"per_device_train_batch_size": batch, "model_max_length": tokens // batch, "gradient_checkpointing": True}
            flags = make(method, **more)
            size = needed(sizes, flags, 2, gpu, nproc)
            holds = [g.name for g in GPUS.values() if needed(sizes, flags, 2, g, nproc) <= g.memory]
            fits = size <= gpu.memory if gpu.memory else None
            rows.append({"method": method, "tokens": tokens, "batch": batch, "bytes": size, "fits": fits, "held_by": holds})
    return rows


def show_grid(rows: list[dict], sizes, make, gpu: GPU, nproc: int) -> None:
    print("GB by the formula, with --gradient_checkpointing: the allocated peak and the CUDA context; the GPUs that hold it\n")
    for row in rows:
        mark = {True: "fits", False: "no", None: ""}[row["fits"]]
        held = " ".join(row["held_by"]) or "none of those known"
        print(f"{row['method']:6}{row['tokens']:>6} tokens{row['bytes'] / 1e9:>10.2f}  {mark:5} {held}")
    if not gpu.memory:
        return print("\n--method shows one of them in full; --gpu NAME says what that GPU can do.")
    best = {row["method"]: row for row in rows if row["fits"]}  # the longest of each method
    if best:
        method = next(method for method in ("lora", "qlora", "full") if method in best)
        row = best[method]
        print(
            f"\nOn {gpu.name} ({gpu.memory / 1e9:.2f} GB): " + ", ".join(f"{m} to {r['tokens']} tokens" for m, r in best.items())
        )
        batch = f" --per_device_train_batch_size {row['batch']}" if row["batch"] > 1 else ""
        print(
            f"To begin with: torchrun --nproc_per_node {nproc} train.py --method {method} --model FOLDER --data RECORDS "
            f"--gradient_checkpointing --model_max_length {row['tokens'] // row['batch']}{batch}"
        )
        return
    flags = make("qlora", model_max_length=512, gradient_checkpointing=True)
    size = needed(sizes, flags, 2, gpu, nproc)
    each = f"each of {nproc} GPUs holds the whole model, " if nproc > 1 else ""
    least = f"the least, qlora at 512 tokens, takes {size / 1e9:.2f} GB."
    print(f"\nNone fits on {gpu.name} ({gpu.memory / 1e9:.2f} GB): {each}and {least}")
    for count in (2, 4, 8, 16):
        size = sharded(sizes, flags, 2, gpu, count)
        if size <= gpu.memory:
            print(f"  sharded over {count} x {gpu.name} with FSDP: {size / 1e9:.2f} GB each; train.py cannot do that yet")
            break
    held = [g.name for g in GPUS.values() if needed(sizes, flags, 2, g) <= g.memory]
    print(f"  one GPU that holds it today: {' '.join(held) or 'none of those known'}")


def verdict(sizes, flags, gpu: GPU, nproc: int, line: Timeline) -> dict:
    need = (line.reserved or line.peak) + gpu.context
    ways = [] if need <= gpu.memory else advice(sizes, flags, width(flags), gpu, nproc)
    return {"gpu": gpu.name, "capacity": gpu.memory, "needed": need, "fits": need <= gpu.memory, "changes": ways}


def show_verdict(answer: dict, nproc: int) -> None:
    room = (answer["capacity"] - answer["needed"]) / 1e9
    each = f" on each of {nproc}" if nproc > 1 else ""
    if answer["fits"]:
        print(f"\nIt fits{each}: {answer['gpu']} has {answer['capacity'] / 1e9:.2f} GB and {room:.2f} GB stay free.")
        return
    print(
        f"\nIt does not fit{each}: {answer['gpu']} has {answer['capacity'] / 1e9:.2f} GB, {-room:.2f} too few. What would help:"
    )
    for way in answer["changes"]:
        print(f"  {way['bytes'] / 1e9:>8.2f} GB  {'fits' if way['fits'] else 'no':5} {way['change']}")


def solve(what: str, sizes, flags, gpu: GPU, nproc: int) -> str:
    """The largest batch or length, or the fewest GPUs, that fit: sought with the formula, confirmed with a simulation."""
    b = width(flags)
    if what == "gpus":
        for count in (1, 2, 3, 4, 6, 8, 16, 32, 64):
            size = needed(sizes, flags, b, gpu) if count == 1 else sharded(sizes, flags, b, gpu, count)
            if size <= gpu.memory:
                how = "" if count == 1 else " sharded with FSDP (by the formula; train.py cannot do that yet)"
                return f"{count} x {gpu.name}{how}: {size / 1e9:.2f} GB each"
        return f"no number of {gpu.name} up to 64: what is not sharded, activations and loss, is too much; --solve length"
    name, step = ("per_device_train_batch_size", 1) if what == "batch" else ("model_max_length", 128)
    most = 4096 if what == "batch" else sizes.max_seq_len

    def fits(value):
        return needed(sizes, replace(flags, **{name: value * step}), b, gpu, nproc) <= gpu.memory

    low, high = 0, most // step
    while low < high:  # the largest that fits lies in low..high
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    for value in range(low, max(0, low - 6), -1):
        tried = replace(flags, **{name: value * step})
        line = predict(rehearsals(tried, sizes, gpu), sizes.n_layers, gpu, nproc)
        if line.reserved + gpu.context <= gpu.memory:
            need = (line.reserved + gpu.context) / 1e9
            return f"--{name} {value * step} is the largest on {gpu.name}: {need:.2f} of {gpu.memory / 1e9:.2f} GB, simulated"
    if low == 0:
        return f"not even --{name} {step} fits on {gpu.name}; without --solve this program says what would"
    return f"--{name} {max(1, low - 6) * step} is near the limit of {gpu.name}: go on from there"


class PureFp16:
    """The starting document's run: every weight in fp16, textbook attention, AdamW straight on them. train.py refuses to
    train so; here it is only counted."""

    def __init__(self, sizes, tokens: int):
        self.sizes, self.supervised = sizes, None
        row = torch.zeros(tokens, dtype=torch.int64)
        self.row = {"tokens": row, "labels": row.clone(), "cu_seqlens": torch.tensor([0, tokens], dtype=torch.int32)}

    def build(self):
        from model import random_model

        self.model = random_model(self.sizes, device="cpu", dtype=torch.float16, attention="textbook")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        return self.model, self.optimizer

    def step(self):
        self.model(**self.row).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def evaluate(self):
        pass

    save = evaluate


def reproduce() -> None:
    """The starting document's sum (7B, 2,048 tokens, fp16, textbook attention) beside the count, and how it comes down."""
    import train
    from model import PRESETS

    sizes, base = PRESETS["7b"], {"model_max_length": 2048, "dtype": "bf16", "device": "cpu"}
    line = predict(lambda layers: PureFp16(replace(sizes, n_layers=layers), 2048), sizes.n_layers)
    flags = train.TrainConfig(method="full", optim="adamw_8bit", pure_bf16=True, attention="textbook", **base)
    closed, counted = formula(sizes, flags, 2), simulated(line, sizes.n_layers)
    rows = layer_rows(line)
    first, middle = ("activations, first layer", "activations, middle layers")
    weights = closed["weights"][1]
    stated = [
        ("weights", 13.5, weights, counted["weights"], "its norm weights were never registered: 266,240 numbers fewer"),
        ("forward, first layer", 0.844, closed[first][1], counted[first], "what nvidia-smi rose by: allocator segments too"),
        ("forward, each other layer", 0.760, closed[middle][1] / 30, counted[middle] / 30, "see below"),
        ("  its rotation and fp16 softmax", 0.7172, None, None, "counted in its own setting"),
        ("backward, a layer's gradients", 1.0, (weights - 4 * 32000 * 4096) / 32, rows[1]["backward_added"], "+ temporaries"),
        ("all gradients", None, weights, counted["gradients"], ""),
        ("AdamW's two moments", None, 2 * weights, 2 * counted["weights"], "left out of its sum: 2 x 13.5 GB"),
        ("its sum / the peak", 69.904, None, counted["allocated peak"], "weights, moments, gradients and activations at once"),
    ]
    print(f"{'GB (10^9 bytes)':34}{'document':>9}{'formula':>9}{'simulated':>10}   difference")
    for name, theirs, ours, seen, why in stated:
        cells = ["" if x is None else f"{x:.3f}" for x in (theirs, ours and ours / 1e9, seen and seen / 1e9)]
        print(f"{name:34}{cells[0]:>9}{cells[1]:>9}{cells[2]:>10}   {why}")
    kept, added, freed = counted[middle] / 30 / 1e9, rows[1]["backward_added"] / 1e9, rows[1]["backward_freed"] / 1e9
    softmax, mask, copies = 32 * 2048 * 2048 * 4 / 1e9, 2048 * 2048 / 1e9, 4 * 2048 * 4096 * 2 / 1e9
    print(f"""
A layer keeps {kept:.3f} GB here and 0.717 there: here the softmax is taken in fp32 and kept beside its fp16 copy
(+ {softmax:.3f}), the mask is kept (+ {mask:.3f}), the rotation's copies are not (- {copies:.3f}). The document read 0.760 off
nvidia-smi, which shows the allocator's segments and not its tensors. Its 1 GB of backward is a layer's gradients,
{added:.3f} GB, and segments for temporaries; what backward frees meanwhile, {freed:.3f} a layer, is not subtracted. And
its sum leaves out AdamW's two moments.

The same fine-tuning step by step (2,048 tokens, allocated peak on a GPU, GB):
""")
    print(f"{'the document: its sum':62}{69.904:>9.2f}")
    print(f"{'... with the AdamW moments it left out':62}{69.904 + 2 * weights / 1e9:>9.2f}")
    pure = {"method": "full", "optim": "adamw_8bit", "pure_bf16": True}
    steps = [
        ("here: fp16 throughout, textbook attention, AdamW", None),
        ("full, fp32 masters, flash attention: no T x T matrix", {"method": "full"}),
        ("+ pure bf16 and 8-bit AdamW: 2 + 2 + 2 bytes a weight, not 18", pure),
        ("+ gradient checkpointing: a block's input kept, not its inside", pure | {"gradient_checkpointing": True}),
        ("LoRA: no gradients and moments but the adapters'", {}),
        ("+ gradient checkpointing", {"gradient_checkpointing": True}),
        ("QLoRA + gradient checkpointing: the weights in 4 bits", {"method": "qlora", "quantize": "nf4"}),
    ]
    for text, flags in steps:
        if flags is None:
            print(f"{text:62}{line.peak / 1e9:>9.2f}")
            continue
        again = flags | ({"gradient_checkpointing": True} if flags.get("quantize") else {})
        config = train.TrainConfig(**base, **again)
        peak = predict(rehearsals(config, sizes, GENERIC), sizes.n_layers, GENERIC).peak
        print(f"{text:62}{peak / 1e9:>9.2f}")


def own_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="memory.py", add_help=False, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"memory.py: {message}\n")
    parser.add_argument("--gpu", help=f"{' '.join(GPUS)}, or a size such as 80GB")
    parser.add_argument("--nproc", type=int, default=1, help="processes of torchrun, one a GPU")
    parser.add_argument("--json", action="store_true", help="one object, in bytes")
    parser.add_argument("--plot", metavar="out.png", help="draw the timeline (matplotlib)")
    parser.add_argument("--solve", choices=["batch", "length", "gpus"], help="the largest, or the fewest, that fit --gpu")
    parser.add_argument("--measure", action="store_true", help="run it on this machine's GPU as well, with random weights")
    parser.add_argument("--reproduce", action="store_true", help="the starting document's table, and how it comes down")
    return parser


def main():
    import train
    from data import DataError, parse_flags
    from lora import LoRAError
    from model import PRESETS, CheckpointError, read_config

    parser = own_flags()
    mine, rest = parser.parse_known_args()
    if {"-h", "--help"} & set(rest):
        print(parser.format_help())
    try:
        for flag in ("--fsdp", "--cpu_offload"):
            if flag in rest and flag[2:] not in train.TrainConfig.__dataclass_fields__:
                raise ValueError(f"{flag}: train.py cannot shard yet; --solve gpus estimates it by the formula")
        if mine.reproduce:
            return reproduce()
        given = parse_flags(train.TrainConfig, "What a training run will need: train.py's flags, and those above.", rest)
        name = given.get("model", "7b")
        sizes = PRESETS.get(name) or read_config(name)
        gpu = find_gpu(mine.gpu) if mine.gpu else None
        if given.get("device") == "cpu" and (gpu or mine.nproc > 1):
            raise ValueError("--device cpu takes neither --gpu nor --nproc")
        on = None if given.get("device") == "cpu" else gpu or GENERIC
        if mine.solve and not gpu:
            raise ValueError("--solve needs --gpu, the GPU to fill")
        if mine.nproc < 1:
            raise ValueError(f"--nproc must be at least 1, not {mine.nproc}")
        if gpu and not gpu.bf16 and (given.get("dtype") == "bf16" or given.get("pure_bf16")):
            raise ValueError(f"{gpu.name} has no bf16: --dtype fp16, which is its default here, or another GPU")
        if mine.measure and not torch.cuda.is_available():
            raise ValueError("--measure: this machine has no CUDA device that PyTorch can use")
        length = given.get("model_max_length", train.TrainConfig.model_max_length)
        if length > sizes.max_seq_len:
            raise ValueError(
                f"--model_max_length {length} is more than the {sizes.max_seq_len} tokens the model was trained to read; for "
                f"{length} tokens a row: --per_device_train_batch_size {-(-length // sizes.max_seq_len)} "
                f"--model_max_length {sizes.max_seq_len}"
            )

        def make(method, **more):
            computed = {} if given.get("dtype", "auto") != "auto" else {"dtype": on.dtype if on else "fp32"}
            packed = {"quantize": "nf4"} if method == "qlora" else {}
            return train.TrainConfig(**packed | train.with_tuples(given) | computed | more | {"method": method})

        if "method" not in given and not mine.solve and not mine.measure and on:
            rows = grid(sizes, make, on, mine.nproc)
            return print(json.dumps({"model": name, "grid": rows})) if mine.json else show_grid(rows, sizes, make, on, mine.nproc)
        flags = make(given.get("method", "lora"))
        if mine.solve:
            return print(solve(mine.solve, sizes, flags, gpu, mine.nproc))
        line = predict(rehearsals(flags, sizes, on), sizes.n_layers, on, mine.nproc)
        real = None
        if mine.measure:
            device = torch.device("cuda", 0)
            real = measure(train.Rehearsal(flags, sizes, device), device)
    except (ValueError, CheckpointError, DataError, LoRAError, OSError) as error:
        parser.exit(2, f"memory.py: {error}\n")

    counted, layers = simulated(line, sizes.n_layers), layer_rows(line)
    measured = simulated(real, sizes.n_layers) if real else None
    if measured:  # the allocator knows no kinds
        measured = {k: v for k, v in measured.items() if k not in ("weights", "adapters", "gradients", "optimizer state")}
    rows = breakdown(formula(sizes, flags, width(flags), on, mine.nproc), counted, measured, line, on, real)
    answer = verdict(sizes, flags, gpu, mine.nproc, line) if gpu else None
    top = line.highest()
    if mine.json:
        keys = ("formula", "simulated", "measured")
        ends = {"allocated": "allocated peak", "reserved": "reserved", "nvidia_smi": "nvidia-smi"}
        totals = {short: {key: rows.get(long, {}).get(key) for key in keys} for short, long in ends.items()}
        terms = {k: {key: row.get(key) for key in keys} for k, row in rows.items() if k not in ends.values()}
        print(
            json.dumps(
                {"model": name, "method": flags.method, "flags": asdict(flags), "terms": terms, "per_layer": layers}
                | {"peak": totals, "peak_phase": f"{top.part}, {top.name}", "verdict": answer}
            )
        )
    else:
        tokens = flags.per_device_train_batch_size * flags.model_max_length
        where = f"{on.name}" if on else "a CPU"
        print(f"{name}, {flags.method}, {tokens:,} tokens a row, {flags.dtype}, on {where}: every position supervised\n")
        show_breakdown(rows)
        print(f"\nThe peak is in the {top.part}, {top.name}.")
        show_layers(layers)
        show_timeline(line)
        if answer:
            show_verdict(answer, mine.nproc)
        elif on:
            held = [g.name for g in GPUS.values() if line.reserved + g.context <= g.memory]
            print(f"\nGPUs that hold it: {' '.join(held) or 'none of those known'}; --gpu NAME says by how much, or what helps.")
    if mine.plot:
        try:
            plot(line, mine.plot, gpu, f"{name}, {flags.method}")
        except ImportError:
            parser.exit(2, "memory.py: --plot needs matplotlib: pip install matplotlib\n")


if __name__ == "__main__":
    main()
