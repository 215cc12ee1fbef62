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
alive. Beside it stands `formula`, the same as arithmetic to be checked by hand; and, with --measure, what a GPU really took.

Two things shorten the work. The layers of a Llama are alike, so 4 and 8 of them are run and the rest follows by a straight line,
exact to the byte. And what a fake tensor cannot show of a GPU is modelled in named terms: cuBLAS's workspace, the scratch
of flash attention's backward, the caching allocator (its rules are replayed on the diary), the CUDA context.

GB are 10^9 bytes, GiB 2^30. With torch.compile, which fuses operations, the prediction is an upper bound.
"""

import argparse
import re
import weakref
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves

# ---------------------------------------------------------------------------------------------------------------------
# The tracker


@dataclass(eq=False, slots=True)
class Block:
    """One storage: its bytes, the phases in which it was born and died, and what it is, where that is known."""

    bytes: int
    born: str
    kind: str | None = None
    died: str | None = None
    away: bool = False  # in the host's memory (CPU offload), not the GPU's
    stream: object = None  # the CUDA stream it was asked for on: FSDP gathers and reduces on streams of their own


MOVED = {  # FSDP's operations on what it sends and receives: which argument that is, and what
    "fsdp::all_gather_copy_in": (1, "gathered weights"),
    "fsdp::split_with_sizes_copy": ("out", "gathered weights"),
    "fsdp::chunk_cat": ("out", "gradients to reduce"),
}


class Tracker(TorchDispatchMode):
    """Follows the birth and death of every storage while PyTorch works inside `with Tracker()`, on real tensors or fake ones.

    Every operation, autograd's in backward included, passes through `__torch_dispatch__`. The storages of what it returns are
    counted once each, however many views share them, until the last reference is gone. `live` and `peak` are bytes; the
    diary is what happened, in order: (1, block) a birth, (-1, block) a death, (0, (part, phase)) the beginning of a phase.
    Temporaries inside one operation are not seen; `scratch` has those known, {operation: function of its arguments -> bytes}.
    away: the kinds of storage that wait in the host's memory; so does what is made of nothing but these."""

    def __init__(self, scratch: dict | None = None, supervised: int | None = None, away: tuple[str, ...] = ()):
        super().__init__()
        self.live = self.peak = 0
        self.part = self.phase = ""
        self.diary: list[tuple] = []
        self.scratch, self.supervised, self.away = scratch or {}, supervised, away
        self._living: dict[int, list] = {}  # a storage's address -> [weak reference to it, its block]

    def begin(self, phase: str) -> None:
        self.phase = phase
        self.diary.append((0, (self.part, phase)))

    def watch(self, tensor: torch.Tensor, kind: str | None = None, away: bool = False) -> None:
        """Count the tensor's storage from now on, if it is not counted yet; `kind` says what it is. Of a tensor that several
        processes hold together: the part of this one."""
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        key = storage._cdata
        if key not in self._living:
            born = self.born(storage.nbytes(), away=away)
            self._living[key] = [weakref.ref(storage, lambda _: self.died(self._living.pop(key)[1])), born]
        block = self._living[key][1]
        if kind in self.away and not block.away:  # it leaves
            self.died(block)
            block = self._living[key][1] = self.born(block.bytes, away=True)
        block.kind = kind or block.kind

    def rest(self, kind: str) -> None:
        """Say what all storages are that are alive and not known as anything."""
        for _, block in self._living.values():
            block.kind = block.kind or kind

    def __enter__(self):
        """Two things no operation tells of: FSDP gives memory back, and takes it again, by resizing a storage; and a tensor in
        shards tries its operations on fake tensors first, which are no memory."""

        def resize(storage, size):
            torch._C.StorageBase.resize_(storage, size)
            if entry := self._living.get(storage._cdata):
                self.died(entry[1])
                entry[1] = self.born(size, entry[1].kind)

        def sharded(parameter, *args, original=FSDPParam._init_sharded_param):
            original(parameter, *args)
            self.watch(parameter._sharded_param_data, self.away[0] if self.away else None)

        def tried(*args, original=ShardingPropagator._propagate_tensor_meta_non_cached):
            with _disable_current_modes():
                return original(*args)

        self._patched = ExitStack()
        self._patched.enter_context(patch.object(torch.UntypedStorage, "resize_", resize))
        self._patched.enter_context(patch.object(FSDPParam, "_init_sharded_param", sharded))
        self._patched.enter_context(patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", tried))
        return super().__enter__()

    def __exit__(self, *error):
        self._patched.close()
        return super().__exit__(*error)

    def born(self, size: int, kind: str | None = None, away: bool = False) -> Block:
        block = Block(size, self.phase, kind, away=away, stream=torch.cpu.current_stream())
        self.live += 0 if away else size
        self.peak = max(self.peak, self.live)
        self.diary.append((1, block))
        return block

    def died(self, block: Block) -> None:
        block.died = self.phase
        self.live -= 0 if block.away else block.bytes
        self.diary.append((-1, block))

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if any(map(is_traceable_wrapper_subclass_type, types)):  # a tensor in shards: its own operations will come by
            return NotImplemented
        result = self._without_numbers(op, args)
        if result is None:
            result = op(*args, **(kwargs or {}))
        if not op.is_view:  # a view brings no storage of its own
            away = bool(self.away) and self._away(args)
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                    self.watch(tensor, away=away)
        if op.name() in MOVED:
            where, kind = MOVED[op.name()]
            for tensor in tree_leaves(args[where] if isinstance(where, int) else kwargs[where]):
                self.watch(tensor, kind)
        if op.name() in self.scratch:
            self.died(self.born(self.scratch[op.name()](*args), "kernel scratch"))
        return result

    def _away(self, args) -> bool:
        """Whether all tensors among the arguments, and at least one, are in the host's memory."""
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        entries = [self._living.get(x.untyped_storage()._cdata) for x in tensors]
        return bool(entries) and all(entry and entry[1].away for entry in entries)

    def _without_numbers(self, op, args):
        """What fake tensors are asked and cannot know. A number: finite, not zero where it counts tokens (fp64:
        those of all processes). How many positions
        have a label: all, the most it can be, or as many as the caller knows of."""
        number = op is torch.ops.aten._local_scalar_dense.default
        masked = op is torch.ops.aten.index.Tensor and args[1][0].dtype == torch.bool
        if not (number or masked) or not any(isinstance(x, FakeTensor) for x in tree_leaves(args)):
            return None
        if number:
            return {torch.bool: True, torch.int64: 1, torch.float64: 1.0}.get(args[0].dtype, 0.0)
        return args[0][: self.supervised].clone()


def follow(recorder, model, optimizer) -> None:
    """Have the phases of every step recorded, layer by layer, and gradients and optimizer state known as such."""

    def mark(name, tensor=None):
        if recorder.phase.startswith("backward"):  # gradient checkpointing computes the block again
            return
        if tensor is None:
            recorder.begin(name)
        elif tensor.requires_grad:
            tensor.register_hook(lambda gradient: recorder.begin(name))  # called when this gradient is complete

    def stepped(*_):
        for value in tree_leaves([dict(state) for state in optimizer.state.values()]):
            if isinstance(value, torch.Tensor):
                recorder.watch(value, "optimizer state")
        recorder.begin("between steps")

    first = {"prepend": True}  # before FSDP gathers the weights, so that this belongs to the phase
    model.register_forward_pre_hook(lambda *_: mark("forward embedding"), **first)
    for i, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: mark(f"forward {i}"), **first)
        layer.register_forward_hook(lambda _, args, output, i=i: mark(f"backward {i}", output), **first)
    model.layers[0].register_forward_hook(lambda _, args, output: mark("backward embedding", args[0]), **first)
    model.norm.register_forward_pre_hook(lambda *_: mark("loss"))
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

    @property
    def moments(self) -> tuple[Counter, Counter, Counter]:
        return self.start, self.peak, self.end

    @property
    def rise(self) -> int:
        return own(self.peak) - own(self.start)

    @property
    def kept(self) -> int:
        return own(self.end) - own(self.start)


def own(moment: Counter) -> int:
    """Bytes of a moment without what FSDP holds for the network, which is asked for before its layer's turn."""
    return moment.total() - moment["gathered weights"] - moment["gradients to reduce"]


@dataclass
class Timeline:
    phases: list[Phase]
    host: int = 0  # the most that waited in the host's memory
    tails: int = 0  # bytes that CUDA's allocator hands out beyond what was asked, at the peak
    reserved: int | None = None  # what it has taken from the GPU in all

    @property
    def highest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.peak.total())

    @property
    def peak(self) -> int:
        return self.highest.peak.total() + self.tails


def timeline(diary: list[tuple], gpu=None) -> Timeline:
    """The diary as phases. For a GPU every size is rounded as its allocator does, which is replayed beside it."""
    allocator = CachingAllocator() if gpu else None
    phases, live, total, highest, peak, tails, away, host = [], Counter(), 0, 0, 0, 0, 0, 0
    for what, block in diary:
        if what == 0:
            if phases:
                phases[-1].end = live.copy()
            phases.append(Phase(*block, live.copy(), live.copy(), live.copy()))
            highest = total  # in this phase
            continue
        if block.away:
            away += what * block.bytes
            host = max(host, away)
            continue
        size = -(-block.bytes // 512) * 512 if gpu else block.bytes
        live[kind_of(block)] += what * size
        total += what * size
        if allocator:
            allocator.allocate(block) if what == 1 else allocator.free(block)
            if total > peak:
                peak, tails = total, allocator.allocated - total
        if total > highest:
            highest, phases[-1].peak = total, live.copy()
    return Timeline(phases[:-1], host, tails, allocator and allocator.reserved)  # the last is only the end


def kind_of(block: Block) -> str:
    """What is not known as weight, gradient, ... is an activation if forward left it behind, else it came and went."""
    if block.kind or block.born == "loss":
        return block.kind or "logits and loss"
    return "activations" if block.born.startswith("forward") and block.died != block.born else "temporary"


FEW = (4, 8)  # layers that are run of a deeper model


def stretch(few: Timeline, more: Timeline, n: int) -> Timeline:
    """The timeline of n alike layers from those of two shallower models. What a phase adds is a straight line in the depth, and
    the layers between the first and the last add the same. What the allocator reserves beyond the peak is taken
    to be what it was."""
    (a, b), made = FEW, []
    low = {(phase.part, phase.name): phase for phase in few.phases}

    def deeper(x: int, y: int) -> int:
        return y + (n - b) * (y - x) // (b - a)

    for phase in more.phases:
        word, layer, twin, names = phase.name.split()[0], phase.layer, phase.name, [phase.name]
        if layer == b - 1:
            twin, names = f"{word} {a - 1}", [f"{word} {n - 1}"]
        elif layer == (1 if word == "forward" else b - 2):  # the first met of those between, which stands for them all
            between = range(1, n - 1) if word == "forward" else range(n - 2, 0, -1)
            twin, names = f"{word} 1", [f"{word} {i}" for i in between]
        elif layer:
            continue
        x, y = low[phase.part, twin], phase
        for name in names:
            start = made[-1].end if made else Counter()
            peak, end = (
                Counter({kind: start[kind] + deeper(p[kind] - x.start[kind], q[kind] - y.start[kind]) for kind in p | q | start})
                for p, q in ((x.peak, y.peak), (x.end, y.end))
            )
            made.append(Phase(phase.part, name, start, peak, end))
    line = Timeline(made, deeper(few.host, more.host), max(0, deeper(few.tails, more.tails)))
    if more.reserved is not None:
        line.reserved = line.peak + more.reserved - more.peak
    return line


# ---------------------------------------------------------------------------------------------------------------------
# What a GPU adds


class CachingAllocator:
    """PyTorch's CUDA allocator, its rules without its memory (c10/cuda/CUDACachingAllocator.cpp).

    It takes segments from the GPU (2 MiB for what is at most 1 MiB, 20 MiB below 10 MiB, else the size rounded up to 2 MiB), cuts
    blocks of multiples of 512 bytes out of them, best fit first, joins free neighbours, and gives nothing back. A rest of
    up to 1 MiB is not cut off a large block, so that is allocated as well."""

    def __init__(self):
        self.allocated = self.reserved = 0
        self.spare = defaultdict(dict)  # (small, stream) -> address -> bytes of each free piece
        self.given = {}  # a tracker's block -> (address, bytes, (small, stream))
        self.top = 0  # the address of the next segment

    def allocate(self, block: Block) -> None:
        size = max(512, -(-block.bytes // 512) * 512)
        small = size <= 2**20
        pool = small, block.stream
        spare = self.spare[pool]
        piece, address = min(((piece, at) for at, piece in spare.items() if piece >= size), default=(0, 0))
        if piece:
            del spare[address]
        else:
            piece = 2**21 if small else 20 * 2**20 if size < 10 * 2**20 else -(-size // 2**21) * 2**21
            address = self.top
            self.top += piece + 1  # a gap: pieces of two segments are never neighbours
            self.reserved += piece
        if piece - size >= (512 if small else 2**20 + 1):
            spare[address + size] = piece - size
            piece = size
        self.given[block] = address, piece, pool
        self.allocated += piece

    def free(self, block: Block) -> None:
        address, size, pool = self.given.pop(block)
        spare = self.spare[pool]
        self.allocated -= size
        size += spare.pop(address + size, 0)
        before = next((at for at, piece in spare.items() if at + piece == address), address)
        spare[before] = spare.get(before, 0) + size


@dataclass(frozen=True)
class GPU:
    name: str
    memory: int  # bytes that PyTorch finds (total_memory), less than the figure on the box
    context: int = 500_000_000  # what CUDA and its kernels take beside PyTorch's tensors; differs by driver, +- 0.1 GB
    hopper: bool = False
    dtype: str = "bf16"  # the 16 bits it computes in

    @property
    def workspace(self) -> int:
        """What cuBLAS takes for each thread that multiplies: forward's and backward's."""
        return 2**25 if self.hopper else 2 * 2**22 + 16 * 2**13

    @classmethod
    def here(cls, device: torch.device) -> "GPU":
        found = torch.cuda.get_device_properties(device)
        return cls(found.name, found.total_memory, hopper=found.major >= 9)


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("t4", int(14.56 * 2**30), 350_000_000, dtype="fp16"),
        GPU("3090", int(23.69 * 2**30), 400_000_000),
        GPU("4090", int(23.64 * 2**30), 450_000_000),
        GPU("a100-40", int(39.39 * 2**30)),
        GPU("a100-80", int(79.15 * 2**30)),
        GPU("h100", int(79.10 * 2**30), 600_000_000, hopper=True),
        GPU("h200", int(139.72 * 2**30), 600_000_000, hopper=True),
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


class FusedNorm(torch.autograd.Function):
    """What CUDA's kernel of RMSNorm keeps and makes; fake tensors would go the CPU's way, in separate operations."""

    @staticmethod
    def forward(ctx, x, shape, weight, eps):
        ctx.save_for_backward(x, weight, x.new_empty(len(x), 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None, torch.empty_like(weight) if ctx.needs_input_grad[2] else None, None


SCRATCH = {"torch_attn::_varlen_attn_backward": flash_scratch}
OFFLOADED = {"fsdp::all_gather_copy_in": lambda shards, *_: sum(shard.nbytes for shard in shards)}  # brought to the GPU first


# ---------------------------------------------------------------------------------------------------------------------
# Prediction and measurement


def perform(run, recorder, prepare) -> None:
    """Build the run, then two steps, an evaluation and a save of it. prepare(model): what there is before the first step."""
    if run.config.optimizer_in_backward:
        raise RuntimeError("steps inside backward are not simulated; without --optimizer_in_backward it takes no less")
    recorder.part = "load"
    recorder.begin("load")
    model, optimizer = run.build()
    prepare(model)
    follow(recorder, model, optimizer)
    for recorder.part in ("first step", "second step"):
        run.step()
    for recorder.part, work in (("evaluation", run.evaluate), ("save", run.save)):
        recorder.begin(recorder.part)
        work()
    recorder.begin("end")


@contextmanager
def processes(count: int):
    """Be the first of so many processes of which there are no others: nothing is sent, all the buffers are there.

    PyTorch's fake process group, and for DDP, which has its buckets agreed on by all and filled by all, three steps less."""

    class Reducer(dist.Reducer):
        def __init__(self, *args):
            super().__init__(*args)
            dist._register_comm_hook(self, None, self.reduced)

        def reduced(self, _, bucket):
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        def _rebuild_buckets(self):
            return False

    from torch.testing._internal.distributed.fake_pg import FakeStore

    real = dist.group.WORLD
    if real:  # train.py's own: it waits
        dist.group.WORLD = dist.new_group(backend="fake", use_local_synchronization=True)
    else:
        dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    ddp = {"_verify_param_shape_across_processes": lambda *_: None, "_sync_module_states": lambda **_: None}
    try:
        with patch.object(dist, "Reducer", Reducer), patch.multiple("torch.nn.parallel.distributed", **ddp):
            yield
    finally:
        _clear_sharding_prop_cache()  # what was worked out for these processes would be used for a real group of the same size
        if real:
            dist.group.WORLD = real
        else:
            dist.destroy_process_group()


def watch(run, dry: bool, gpu: GPU | None = None) -> Tracker:
    """Perform the run inside a tracker. dry: on fake tensors."""

    def prepare(model):
        for name, weight in model.named_parameters():
            tracker.watch(weight, "adapters" if "lora_" in name else "weights")
        for tensor in run.row.values():
            tracker.watch(tensor, "batch")
        if run.processes > 1 and not run.config.fsdp:
            tracker.rest("gradients")  # the buckets in which DDP has them
        for _ in range(2 if gpu else 0):
            tracker.born(gpu.workspace, "cuBLAS workspace")

    run.connect()
    fake = FakeTensorMode(allow_non_fake_inputs=True) if dry else nullcontext()
    scratch = (SCRATCH if gpu else {}) | (OFFLOADED if run.config.cpu_offload and dry else {})
    away = KEPT if run.config.cpu_offload and dry else ()
    norm = patch("torch.nn.functional.rms_norm", FusedNorm.apply) if gpu and dry else nullcontext()
    with fake, norm, Tracker(scratch, run.supervised if dry else None, away) as tracker:
        perform(run, tracker, prepare)
    return tracker


def predict(run, gpu: GPU | None = None) -> Timeline:
    """The timeline of a run on fake tensors; with a GPU: as on that GPU. run: a dataclass with the model's `sizes`, how many
    `processes` share the work, `row`, the tensors of a micro-batch, and with `connect()` (what needs numbers: the mesh of the
    processes), `build()` -> (model, optimizer), `step()`, `evaluate()`, `save()`."""
    n = run.sizes.n_layers

    def of(layers):
        return timeline(watch(replace(run, sizes=replace(run.sizes, n_layers=layers)), True, gpu).diary, gpu)

    with processes(run.processes) if run.processes > 1 else nullcontext():
        return of(n) if n <= FEW[1] else stretch(*map(of, FEW), n)


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
    torch.cuda.empty_cache()
    perform(run, gauge := Gauge(), lambda model: None)
    return Timeline(gauge.phases[:-1], reserved=torch.cuda.memory_reserved())  # it is never given back by itself


# ---------------------------------------------------------------------------------------------------------------------
# The closed form


def linears(s) -> dict[str, tuple[int, int]]:
    """(out, in) of the seven linears of a block."""
    c, f, kv = s.dim, s.hidden_dim, s.n_kv_heads * s.dim // s.n_heads
    return {"wq": (c, c), "wk": (kv, c), "wv": (kv, c), "wo": (c, c), "w1": (f, c), "w2": (c, f), "w3": (f, c)}


def outer(s) -> dict[str, tuple[int, int]]:
    return {"tok_embeddings": (s.dim, s.vocab_size), "output": (s.vocab_size, s.dim)}


def trained(s, flags) -> set[str]:
    """The matrices that are trained, or have adapters that are."""
    if flags.method == "full":
        return {*linears(s), *outer(s)}
    named = {*flags.lora_targets} & {*linears(s), *outer(s)}
    return named | {*linears(s)} if "all-linear" in flags.lora_targets else named


def letters(sizes, flags, nproc: int = 1) -> dict:
    """What the formula's arithmetic is written in. T tokens in a row, n of them in a chunk of the loss; C dim, F hidden_dim,
    V vocabulary, H heads, K width of all keys, L layers, r LoRA's rank; W numbers in a block's linears, E in all else, N trained.
    Bytes of a number: b in the computation, g in a gradient, s between the blocks and in weights that are not packed.
    Sharded over P GPUs: this one's share of N is M, in whole rows; gathered, a block is G bytes and what is in no block R; to be
    reduced, a block's gradients are B."""
    C, V, L, r, inside = sizes.dim, sizes.vocab_size, sizes.n_layers, flags.lora_rank, linears(sizes)
    T, full, half = flags.per_device_train_batch_size * flags.model_max_length, flags.method == "full", flags.dtype != "fp32"
    W, E = sum(out * inn for out, inn in inside.values()), (2 * V + 2 * L + 1) * C
    each = {name: (L if name in inside else 1) * sum(shape) for name, shape in (inside | outer(sizes)).items()}
    N = L * W + E if full else r * sum(each[name] for name in trained(sizes, flags))
    known = {"T": T, "n": min(T, 256), "C": C, "F": sizes.hidden_dim, "V": V, "H": sizes.n_heads, "K": inside["wk"][0], "L": L}
    small = half and full and (flags.pure_bf16 or flags.fsdp)  # 16 bits in the computation, whatever is kept
    known |= {"r": r, "W": W, "E": E, "N": N, "b": 2 if half else 4, "g": 2 if small else 4}
    known["s"] = 2 if half and (small or not full) else 4
    if flags.fsdp:  # row by row; where there are fewer rows than GPUs, nothing fills up the rest
        rows = {x: -(-r // nproc) * inn + -(-out // nproc) * r for x, (out, inn) in (inside | outer(sizes)).items()}
        block, rest = (sum(rows[x] for x in trained(sizes, flags) & set(among)) for among in (inside, outer(sizes)))
        gathered = round(eval(PACKED[flags.quantize], {}, known)) // L + 2 * C * known["s"]
        known |= {
            "P": nproc,
            "M": -(-N // nproc) if full else L * block + rest,
            "G": gathered + (0 if full else block * nproc * 4),
        }
        known["R"] = (2 * V + 1) * C * known["s"] + (0 if full else rest * nproc * 4)
        known["B"] = 4 * (W + 2 * C if full else block * nproc)
    return known


PACKED = {  # NF4: 4 bits, 8 a block of 64, 32 a block of 2^14. int8: 4 bytes a row.
    "none": "L * W * s",
    "nf4": "L * W * (4 + 8 / 64 + 32 / 16384) / 8",
    "int8": "L * W * (1 + 4 / C)",
}


def formula(sizes, flags, gpu: GPU | None = None, nproc: int = 1) -> dict[str, tuple[str, int]]:
    """The run as arithmetic: name -> (expression, bytes). sizes: the model's; flags: train.py's, with --dtype decided.

    Each term is written once, in `letters` and the names of earlier terms, and Python computes what is printed. Where several
    moments compete, the largest is the term."""
    full, again, half = flags.method == "full", flags.gradient_checkpointing, flags.dtype != "fp32"
    masters = full and half and not (flags.pure_bf16 or flags.fsdp)  # fp32 weights, cast by autocast where they are used
    moved, inside, known = trained(sizes, flags), linears(sizes), letters(sizes, flags, nproc)
    C, F, V, L, s = (known[letter] for letter in "CFVLs")
    terms, kept_in = {}, 2 if flags.pure_bf16 else 4  # bytes

    def term(name: str, *moments: str) -> None:
        size, text = max((round(eval(text, {}, known)), text) for text in moments)
        known[re.sub(",|'s", "", name).replace(" ", "_")] = size
        terms[name] = text.replace("_", " ").replace("*", "x"), size

    # What stays from the first step on; of it, sharded, a part. DDP's buckets are the gradients, and stay.
    mine, part, buckets = ("M", " / P", False) if flags.fsdp else ("N", "", nproc > 1)
    term("weights", f"({PACKED[flags.quantize]} + E * s){part}" if not (full and flags.fsdp) else f"M * {kept_in}")
    term("adapters", "0" if full else f"{mine} * 4")
    twice = buckets and flags.gradient_accumulation_steps > 1  # what earlier rows left is not in the buckets yet
    term("gradients", f"{mine} * {kept_in}" if flags.fsdp else "2 * N * g" if twice else "N * g")
    term("optimizer state", f"{mine} * 2 * (1 + 4 / 256)" if flags.optim == "adamw_8bit" else f"{mine} * 8")
    term("cuBLAS workspace", f"2 * {gpu.workspace if gpu else 0}")
    if flags.fsdp:  # in forward a block, its buffer and the last one's; at the beginning the rest and its buffer, too
        term("gathered weights", "3 * G + R", "2 * G + 2 * R")
        term("gradients to reduce", "B")

    # What a block keeps. Its norms: their inputs and what uses their results; on a CPU the inputs in fp32, and what a trained
    # weight is multiplied with.
    used = bool(moved & {"wq", "wk", "wv"}) + bool(moved & {"w1", "w3"})  # of the two norms' results
    if gpu:
        norms = "18" if masters else f"(2 * s + {2 if full else used} * b)"  # 18: inputs, and 5 bf16 copies of the results
    else:
        norms = "26" if masters else "(16 + 2 * b)" if full else f"(8 + {used} * b)"
    attention = f"T * ({2 + ('wo' in moved)} * C + 2 * K) * b + T * H * 4"  # q, k, v, the result; one fp32 number a row
    if flags.attention == "textbook":  # softmax in fp32, and in 16 bits; the mask
        attention = f"T * 4 * C * b + H * T * T * {6 if half else 4} + T * T"
    elif gpu and half:  # k and v are repeated for every query head
        attention = "T * 4 * C * b + T * H * 4"
    block = f"T * C * {norms} + {attention} + T * F * {2 + ('w2' in moved)} * b"
    if not full and (within := moved & inside.keys()):
        block += f" + T * r * {len(within)} * b" + f" + r * {sum(sum(inside[x]) for x in within)} * 2" * half
    copies = " + W * 2" * masters  # of the weights, by autocast
    kept = "T * C * s" if again else block + copies  # with checkpointing only the block's input
    made_by_nothing_trained = not (again or full or "tok_embeddings" in moved)  # such an input needs no gradient
    term("activations, first layer", kept + f" - T * C * {'s' if gpu else 4}" * made_by_nothing_trained)
    term("activations, last layer", kept if L > 1 else "0")
    term("activations, middle layers", f"{max(0, L - 2)} * activations_last_layer")

    # The turn: the last norm's result, that where there is a label, its gradient; then the logits of n positions at a time, their
    # logarithms of probabilities, which become their gradient, and the head's.
    held = "3 * T * C * s" + " + T * C * 4" * (half and not gpu)
    moments = ["8 * n * V + n * C * s"]
    if half:
        moments = ["10 * n * V"]
    if masters:
        moments = ["8 * n * V + 10 * V * C + n * C * 8"]
    elif full:
        moments += ["8 * n * V + 2 * V * C * g + n * C * b"]
    moments = [f"{text} + {held}" for text in moments]
    term("logits and loss", *moments)

    # A block's backward: gradients of the feed-forward layer's width, and a weight's gradient or a weight turned back.
    if full:
        moments = ["2 * T * F * b" + " + C * F * b" * (not buckets)]  # DDP takes each gradient at once
        if masters and again:
            moments.append("C * F * 4 + T * C * 2")
            moments.append(f"3 * C * F * 4 + C * F * 2 + T * C * 42 - ({block}{copies})")  # w1's, w2's, w3's
            moments.append(f"W * 4 + C * C * 2 + T * C * 8 - ({block}{copies})")  # all gradients
        elif half and not buckets:  # all its gradients, its activations gone
            moments.append(f"W * g + T * C * {(28 if masters else 24) - 4 * bool(gpu)} - ({block}{copies})")
    else:
        moments = [f"{2 if 'w2' in moved else 3} * T * F * b"]
        if flags.quantize != "none":
            moments += ["T * F * b + C * F * b", "C * F * b + 2 * T * C * b" if again else "C * F * b"]
    if flags.attention == "textbook":
        moments.append(f"H * T * T * 4 + T * C * {(4 if gpu else 2) if half else 8} + T * F * b")
    if again:  # the block once more, without a copy of its input
        moments = [f"{block}{copies}{' - T * C * s' * bool(gpu or s == 4)} + {text}" for text in moments]
    term("a block's backward", *moments)
    shapes = inside | outer(sizes)
    largest = min(2**24, max(V * C, C * F) if full else max(flags.lora_rank * x for name in moved for x in shapes[name]))
    if flags.fsdp:
        largest = min(largest, -(-max(V * C, C * F) // nproc)) if full else largest
    work = f"{largest} * ({8 if flags.pure_bf16 else 7} * 4 + 8 / 256)"  # a piece in fp32, eight times
    term("optimizer's work", work if flags.optim == "adamw_8bit" else "0")

    # The peak: the highest of the moments at which it can be: the loss, the last block's backward, the first's, the optimizer.
    stays = "weights + adapters + optimizer_state + cuBLAS_workspace + " + "gradients + " * buckets
    if flags.cpu_offload:
        term("in the host's memory", "weights + adapters + gradients + optimizer_state")
        known |= dict.fromkeys(("weights", "adapters", "gradients", "optimizer_state", "M"), 0)
    first, activations = "activations_first_layer", "activations_first_layer + activations_middle_layers + activations_last_layer"
    earlier = " + gradients" * (flags.gradient_accumulation_steps > 1 and not buckets)  # of the rows before
    backward = " + a_block_backward + T * C * s" + " + T * C * s" * (full and s == 4)
    if flags.fsdp:  # in backward the block at work and the next one are whole, and the gradients of the last are on their way
        made, head = "0" if flags.cpu_offload else f"W * {kept_in} / P" if full else "M * 4 / L", " + V * C * g" * full
        moments = [
            stays + activations + earlier + " + logits_and_loss + T * C * s + G + R",
            stays + activations + earlier + head + backward + " + 2 * G + R",
            stays + f"{first} + activations_middle_layers + B + 2 * G + R" + (earlier or f" + {made}") + head + backward,
            stays + f"2 * {first} + B + 2 * G + R" + (earlier or f" + (L - 2) * {made}") + head + backward,
            stays + "gradients" + " + 2 * V * C * (g + 4)" * full,  # what is in no block, reduced at last
        ]
    else:
        moments = [
            stays + activations + " + T * C * s" + earlier + " + logits_and_loss",
            stays + activations + (earlier or " + V * C * g" * (full and not buckets)) + backward,
            stays + "gradients + " * (not buckets) + "optimizer_work",
        ]
        if full:
            made = "0" if buckets else "gradients - (W + V * C) * g"
            moments.append(stays + f"{made} + {first}" + backward)
            moments.append(stays + "gradients + " * (not buckets) + "T * C * s" + " + V * C * g" * bool(earlier or buckets))
    term("allocated peak", *moments)
    if flags.cpu_offload:
        terms = {name: term for name, term in terms.items() if name not in KEPT}
    return {name: term for name, term in terms.items() if term[1] or name != "cuBLAS workspace"}


KEPT = ("weights", "adapters", "gradients", "optimizer state")


def simulated(line: Timeline, n_layers: int) -> dict[str, int]:
    """The formula's terms as they were counted, in the second step. (A GPU's allocator counts no kinds.)"""
    phases = {phase.name: phase for phase in line.phases if phase.part == "second step"}
    top, last = line.highest.peak, n_layers - 1
    terms = {kind: top[kind] for kind in ("cuBLAS workspace",) if top[kind]}
    if line.host:
        terms["in the host's memory"] = line.host
    elif "weights" in top:
        terms |= {kind: top[kind] for kind in ("weights", "adapters")}
        terms["gradients"] = max(phase.end["gradients"] for phase in phases.values())
        terms["optimizer state"] = phases["between steps"].end["optimizer state"]
    if "batch" in top:  # counted by kinds
        for kind in ("gathered weights", "gradients to reduce"):
            if most := max(phase.peak[kind] for phase in phases.values() if phase.layer is not None):
                terms[kind] = most
    return terms | {
        "activations, first layer": phases["forward 0"].kept,
        "activations, last layer": phases[f"forward {last}"].kept if last else 0,
        "activations, middle layers": sum(phases[f"forward {i}"].kept for i in range(1, last)),
        "logits and loss": phases["loss"].rise,
        "a block's backward": phases[f"backward {last}"].rise,
        "optimizer's work": phases["optimizer"].rise,
        "allocated peak": line.peak - line.tails,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Will it fit, and if not, what would


def needed(s, flags, gpu: GPU, nproc: int = 1) -> int:
    """Bytes by the formula: the allocated peak and the context."""
    return formula(s, flags, gpu, nproc)["allocated peak"][1] + gpu.context


def cheaper(flags) -> list[tuple[str, dict]]:
    """Changes that save memory, the cheapest first: (what it is and costs, the flags it changes)."""
    full, batch, length = flags.method == "full", flags.per_device_train_batch_size, flags.model_max_length
    pure, qlora = {"optim": "adamw_8bit", "pure_bf16": True}, {"method": "qlora", "quantize": "nf4"}
    lora = {"method": "lora", "pure_bf16": False, "optim": "adamw"}
    fewer = {"per_device_train_batch_size": batch // 2, "gradient_accumulation_steps": flags.gradient_accumulation_steps * 2}
    masters, alone = full and not (flags.pure_bf16 or flags.fsdp), not flags.optimizer_in_backward
    halved = f"--per_device_train_batch_size {batch // 2} and twice the accumulation, the same steps"
    ways = [
        (not flags.gradient_checkpointing, "--gradient_checkpointing, a third more time", {"gradient_checkpointing": True}),
        (masters and flags.optim == "adamw", "--optim adamw_8bit, the same losses to rounding", {"optim": "adamw_8bit"}),
        (masters and flags.dtype == "bf16", "--pure_bf16 --optim adamw_8bit, no fp32 weights", pure),
        (flags.method == "lora" and flags.quantize != "nf4", "--method qlora, 4-bit weights, a little slower", qlora),
        (
            flags.fsdp and not flags.cpu_offload,
            "--cpu_offload True, what stays waits in the host's memory",
            {"cpu_offload": True},
        ),
        (batch > 1 and alone, halved, fewer),
        (batch == 1 and length > 256, f"--model_max_length {length // 2}, cutting documents", {"model_max_length": length // 2}),
        (full, "--method lora, other weights stay as they are", lora),
        (full, "--method qlora", lora | qlora),
    ]
    return [(change, new) for useful, change, new in ways if useful]


def sharded(flags, **more):
    """The same in shards, with fp32 weights and moments: these are what sharding makes affordable."""
    return replace(flags, **{"fsdp": True, "optim": "adamw", "pure_bf16": False} | more)


def advice(sizes, flags, gpu: GPU, nproc: int) -> list[dict]:
    """Each change by itself; if none is enough, one after the other together; then more GPUs. [{change, bytes, fits}]"""
    found = []

    def fits(change, flags, nproc=nproc):
        size = needed(sizes, flags, gpu, nproc)
        found.append({"change": change, "bytes": size, "fits": size <= gpu.memory})
        return size <= gpu.memory

    for change, new in cheaper(flags):
        fits(change, replace(flags, **new))
    if any(way["fits"] for way in found):
        return found
    words = []
    while (ways := cheaper(flags)) and (len(ways) > 1 or flags.model_max_length > 512):
        flags = replace(flags, **ways[0][1])
        words.append(ways[0][0].split(",")[0])
        if len(words) > 1 and fits(" ".join(words), flags):
            return found
    for count in sorted({nproc, 2, 4, 8, 16} - {*range(nproc), 1}):
        for more in ({}, {"cpu_offload": True}):
            words = f"the same, sharded over {count} GPUs: --nproc {count} --fsdp" + " --cpu_offload" * bool(more)
            if fits(words, sharded(flags, **more), count):
                return found
    return found


def listed(ways: list[dict]) -> str:
    return "".join(f"\n  {way['bytes'] / 1e9:>8.2f} GB  {'fits' if way['fits'] else 'no':5} {way['change']}" for way in ways)


def explain_out_of_memory(sizes, flags, gpu: GPU | None, nproc: int, peak: int | None = None, in_use: int | None = None) -> str:
    """What to say when memory ran out, or will: bytes in use, the peak predicted (None: by the formula), what helps."""
    terms = {name: size for name, (_, size) in formula(sizes, flags, gpu, nproc).items()}
    gpu, peak = gpu or GPU("this machine", 0), peak or terms["allocated peak"]
    largest = sorted(terms.keys() - {"allocated peak"}, key=terms.get, reverse=True)[:4]
    used = "" if in_use is None else f"out of memory: {in_use / 1e9:.2f} of {gpu.memory / 1e9:.2f} GB were in use, "
    most = ", ".join(f"{name} {terms[name] / 1e9:.2f}" for name in largest)
    return f"{used}a peak of {peak / 1e9:.2f} GB was predicted, most of it {most}" + listed(advice(sizes, flags, gpu, nproc))


# ---------------------------------------------------------------------------------------------------------------------
# The program. What it answers is in sizing/pages.py, which knows train.py and hands over its own build and step.


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
    parser = own_flags()
    mine, rest = parser.parse_known_args()
    if {"-h", "--help"} & set(rest):
        print(__doc__ + parser.format_help())
    from sizing.pages import answer  # here, as it imports this file

    try:
        answer(mine, rest)
    except (ValueError, OSError) as error:
        parser.exit(2, f"memory.py: {error}\n")


if __name__ == "__main__":
    from memory import main  # of the module that train.py knows, not of this second one

    main()
