"""Memory: what a training run will need, predicted by running its real step on tensors that have no numbers, and counting.

An activation is a tensor that forward leaves behind because backward will want it: the derivative of x * y needs x and y. Forward
piles them up layer by layer, and backward, which goes from the last layer to the first, takes them off the pile in the opposite
order while it adds gradients. So memory is highest somewhere around the turn, and the question is how high:

    peak = weights + adapters + optimizer state                  there from the first step on
         + activations of all layers                             (about 34 x T x dim + ... bytes a layer, see `formula`)
         + the loss's logits, or a block's backward              whichever is more, at the turn

Calculators guess these terms. Here nothing is guessed: PyTorch runs `build` and `training_step` of train.py on fake tensors, which
have shapes and storages but no numbers (7B takes a few seconds and no GPU), and a `Tracker` writes down the birth and the
death of every storage. What is alive is what is needed. Nothing has to be told which tensors are saved for backward: they are
alive. Beside it stands `formula`, the same in closed form, to be checked by hand; and, with --measure, what a GPU really took.

Two things shorten the work. The layers of a Llama are alike, so 3 and 6 of them are run and the rest follows by a straight line,
exact to the byte. And what a fake tensor cannot show of a GPU is modelled in named terms: cuBLAS's workspace, the scratch
of flash attention's backward, the caching allocator (its rules are replayed on the diary), the CUDA context.

GB are 10^9 bytes, GiB 2^30. With torch.compile, which fuses operations, the prediction is an upper bound.
"""

import argparse
import bisect
import json
import re
import sys
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

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
    Temporaries inside one operation are not seen; `scratch` names those known: {operation: function of its arguments -> bytes}."""

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
        if not any(isinstance(x, FakeTensor) for x in tree_leaves(args)):
            return None
        if op is torch.ops.aten._local_scalar_dense.default:
            return {torch.bool: True, torch.int64: 1}.get(args[0].dtype, 0.0)
        if op is torch.ops.aten.index.Tensor and args[1][0].dtype == torch.bool:
            return args[0][: self.supervised].clone()
        return None


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
    phases, live, reserved, peak, tails = [], Counter(), None, 0, 0
    total = 0
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
    along the middle layers one in their number."""
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
            ends = [
                line(getattr(low, end), getattr(first, end), getattr(second, end), layer) for end in ("start", "peak", "end")
            ]
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


def watch(run, dry: bool, gpu: GPU | None = None) -> Tracker:
    """Build the run and take two steps, an evaluation and a save of it, inside a tracker. dry: on fake tensors."""
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
        follow(tracker, model, optimizer)
        for tracker.part in ("first step", "second step"):
            run.step()
        for tracker.part, work in (("evaluation", run.evaluate), ("save", run.save)):
            tracker.begin(tracker.part)
            work()
        tracker.begin("end")
    return tracker


FEW = (3, 6)


def predict(rehearse, n_layers: int, gpu: GPU | None = None) -> Timeline:
    """The timeline of a run on fake tensors. rehearse(layers) -> the run with that many layers: `build()` -> (model,
    optimizer), `step()`, `evaluate()`, `save()`, and `row`, the tensors of a micro-batch. With a GPU: as on that GPU."""
    if n_layers <= FEW[1]:
        return timeline(watch(rehearse(n_layers), True, gpu).diary, gpu)
    return stretch(*(timeline(watch(rehearse(n), True, gpu).diary, gpu) for n in FEW), FEW, n_layers)


def measure(run) -> Timeline:
    """The same on real tensors, counted in the same way."""
    return timeline(watch(run, False).diary)


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
    if gpu:
        size, attention = T * C * per_token + T * 4 * C * b, f"T x 4 C x {b}"
    else:  # the CPU joins its documents' results: one tensor more, and k and v are not repeated
        joined = bool("wo" in chosen or full)
        size, attention = T * C * per_token + T * ((2 + joined) * C + 2 * K) * b, f"T x ({2 + joined} C + 2 K) x {b}"
    if flags.attention == "textbook":
        size -= T * C * b * (1 + bool("wo" in chosen or full)) if not gpu else 0
        size += H * T * T * (4 + (b if b == 2 else 0)) + T * T
        attention += " + H x T x T x (fp32 softmax and its copy) + T x T"
    else:
        size += T * H * 4
    size += T * wide * F * b + T * 8
    kept += f" + {attention} + T x {wide} F x {b} + T x (4 H + 8)"
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
    several = T > n
    copy = 4 if S == 2 else 0  # the norm's fp32 copy of its input, when that was not fp32 (then the input itself is freed)
    held = T * C * (copy + (S if full or S == 4 and masters else 0) + S + (S if several else 0) - (S if S == 2 else 0))
    logits = 3 * n * V * 4
    head = V * C * 2 + n * C * 2 if masters else 0
    before = V * C * (2 if masters else g) if full and several else 0
    moments = {"3 x n x V x 4": held + logits + head + before}
    if S == 2:
        moments["the norm's backward, T x C x 22"] = T * C * 22
    if masters:
        moments["the head's gradient, V x C x (2 + 4)"] = held + V * C * 6
    elif full:
        moments["the head's gradients"] = held + (3 * V * C * g + n * C * b if several else V * C * g + n * V * b + T * C * b)
    if masters and again:  # autocast's copies are let go at the end of forward, before that backward
        moments = {k: v - L * casts for k, v in moments.items()}
        moments["2 x n x V x 4 in forward"] = 3 * T * C * 4 + V * C * 2 + 2 * n * V * 4
    name, loss = max(moments.items(), key=lambda item: item[1])
    terms["logits and loss"] = f"{name} + the norm's and the loss's inputs" if "x 4" in name else name, loss

    # A block's backward: two gradients of the feed-forward layer's width, a weight's gradient or a weight turned back.
    mixed, weight = T * F * b, C * F
    if full:
        backward = {"2 x T x F x b + C x F x 2": 2 * mixed + weight * (2 if b == 2 else 4)}
        if not again:
            backward["its gradients for its activations"] = block * g - middle + T * C * (28 if masters else 24)
    else:
        packed = {"none": 0, "nf4": b, "int8": 4 + (b if b == 2 else 0)}[flags.quantize] * weight
        backward = {"2 x T x F x b": 2 * mixed}
        if packed:
            one = weight * b
            backward |= {"T x F x b + a weight turned back": mixed + one, "a weight turned back": packed + again * 2 * T * C * b}
            backward["a weight turned back + 3 x T x C x b"] = one + 3 * T * C * b * again
    name, extra = max(backward.items(), key=lambda item: item[1])
    if again:
        name, extra = f"the block once more, {size + casts:,}, + {name}", extra + size + casts - (T * C * 2 if masters else 0)
    terms["a block's backward"] = name, extra
    largest = max(V * C, C * F) if full else max(size for size, _ in thin)
    work = largest * (32 + 8 / 256) if flags.optim == "adamw_8bit" else 0
    terms["optimizer's work"] = (f"{largest:,} x 8 fp32 numbers" if work else "none, it is fused"), round(work)

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
        return phase.end["activations"] - phase.start["activations"]

    def rise(name):
        return phases[name].peak.total() - phases[name].start.total()

    return {kind: top[kind] for kind in ("weights", "adapters", "cuBLAS workspace")} | {
        "gradients": max(phase.peak["gradients"] for phase in phases.values()),
        "optimizer state": phases["between steps"].end["optimizer state"],
        "activations, first layer": kept(0),
        "activations, middle layers": sum(kept(i) for i in range(1, n_layers - 1)),
        "activations, last layer": kept(n_layers - 1) if n_layers > 1 else 0,
        "logits and loss": rise("loss"),
        "a block's backward": rise(f"backward {n_layers - 1}"),
        "optimizer's work": rise("optimizer"),
        "allocated peak": line.peak,
    }
