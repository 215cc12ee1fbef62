"""Memory: what a training run will need, predicted by running its real step on tensors that have no numbers, and counting.

An activation is a tensor that forward leaves behind because backward will want it: the derivative of x * y needs x and y. Forward
piles them up layer by layer, and backward, which goes from the last layer to the first, takes them off the pile in the opposite
order while it adds gradients. So memory is highest somewhere around the turn, and the question is how high:

    peak = weights + adapters + optimizer state                  there from the first step on
         + activations of all layers                             (LoRA in 16 bits: about 32 x T x dim bytes a layer)
         + the loss's logits, or a block's backward              whichever is more, at the turn

With adapters, that is. In full fine-tuning the gradients are as many as the weights and all there when backward ends: that is its
peak, unless the activations that have gone by then were more.

Calculators guess these terms. Here nothing is guessed: PyTorch runs `build` and `training_step` of train.py on fake tensors,
which have shapes and storages but no numbers (7B takes a few seconds and no GPU), and a `Tracker` writes down the birth and the
death of every storage. What is alive is what is needed. Nothing has to be told which tensors are saved for backward: they are
alive. The layers of a Llama are alike, so of a deep one 5 are run, and what happened to the third is repeated in the diary.

    python memory.py --model 7b --gpu 3090                                          what that GPU can do with a 7B
    python memory.py --model 7b --method qlora --model_max_length 2048 --gpu t4     one run: terms, layers, timeline, verdict

This file watches, reads the diary and predicts. In sizing/ is what stands beside that: the same sum as arithmetic, to be checked
by hand (formula.py); what a GPU adds that fake tensors cannot show: the allocator's rules, kernels' scratch, context (gpu.py);
layers and processes that are not there (depth.py, shards.py); what to change when it does not fit (advice.py); what the program
prints (pages.py); and train.py's own build and step, handed over to be watched (rehearsal.py).

GB are 10^9 bytes, GiB 2^30. With torch.compile, which fuses operations, the prediction is an upper bound.
"""

import sys
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves

from sizing.advice import explain_out_of_memory as explain_out_of_memory  # a public door of this file
from sizing.depth import FEW, deepen, layer_of
from sizing.formula import KEPT, SENT
from sizing.gpu import SCRATCH, CachingAllocator, FusedNorm, fused_dropout
from sizing.shards import MOVED, OFFLOADED, processes, told

# ---------------------------------------------------------------------------------------------------------------------
# The tracker


@dataclass(eq=False, slots=True)
class Block:
    """One storage: its bytes, the phases in which it was born and died, and what it is, where that is known."""

    bytes: int
    born: str
    kind: str | None = None
    layer: int | None = None  # of the weight it belongs to, or in whose phase it was born
    died: str | None = None
    away: bool = False  # in the host's memory (CPU offload), not the GPU's
    stream: object = None  # the CUDA stream it was asked for on: FSDP gathers and reduces on streams of their own


STEPPED = ("weights", "adapters", "gradients")  # by these an operation of the optimizer shows which weight it is for


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
        self.part, self.phase, self.layer = "", "", None  # layer: the one at work
        self.diary: list[tuple] = []
        self.scratch, self.supervised, self.away = scratch or {}, supervised, away
        self._living: dict[int, list] = {}  # a storage's address -> [weak reference to it, its block]

    def begin(self, phase: str) -> None:
        self.phase, self.layer = phase, layer_of(phase)
        self.diary.append((0, (self.part, phase)))

    def watch(self, tensor: torch.Tensor, kind: str | None = None, layer: int | None = None, away: bool = False) -> None:
        """Count the tensor's storage from now on, if it is not counted yet; `kind` and `layer` say what it is. Of a tensor that
        several processes hold together: the part of this one."""
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        key = storage._cdata
        if key not in self._living:
            born = self.born(storage.nbytes(), away=away)
            self._living[key] = [weakref.ref(storage, lambda _: self.died(self._living.pop(key)[1])), born]
        block = self._living[key][1]
        if kind in self.away and not block.away:  # it leaves
            self.died(block)
            block = self._living[key][1] = self.born(block.bytes, away=True)
        block.kind, block.layer = kind or block.kind, block.layer if layer is None else layer

    def resized(self, storage: torch.UntypedStorage, size: int) -> None:
        if entry := self._living.get(storage._cdata):
            self.died(entry[1])
            entry[1] = self.born(size, entry[1].kind)

    def rest(self, kind: str) -> None:
        """Say what all storages are that are alive and not known as anything."""
        for _, block in self._living.values():
            block.kind = block.kind or kind

    def __enter__(self):
        self._told = told(self)  # what FSDP does by no operation
        return super().__enter__()

    def __exit__(self, *error):
        self._told.close()
        return super().__exit__(*error)

    def born(self, size: int, kind: str | None = None, away: bool = False) -> Block:
        block = Block(size, self.phase, kind, self.layer, away=away, stream=torch.cpu.current_stream())
        self.live += 0 if away else size
        self.peak = max(self.peak, self.live)
        self.diary.append((1, block))
        return block

    def died(self, block: Block) -> None:
        block.died = self.phase
        self.live -= 0 if block.away else block.bytes
        self.diary.append((-1, block))

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):  # every second call; a tenth of the time
            return args[0].fake_device
        if any(map(is_traceable_wrapper_subclass_type, types)):  # a tensor in shards: its own operations will come by
            return NotImplemented
        result = self._without_numbers(op, args)
        if result is None:
            result = op(*args, **(kwargs or {}))
        if not op.is_view:  # a view brings no storage of its own
            working = self.phase == "optimizer"
            blocks = self._blocks(args) if self.away or working else []
            if working:  # on one weight after the other
                self.layer = next((block.layer for block in blocks if block.kind in STEPPED), self.layer)
            away = bool(self.away) and (working or (bool(blocks) and all(x.away for x in blocks)))  # where its weights are
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and (getattr(tensor, "fake_device", None) or tensor.device).type != "meta":
                    self.watch(tensor, away=away)
        if op.name() in MOVED:
            where, kind = MOVED[op.name()]
            for tensor in tree_leaves(args[where] if isinstance(where, int) else kwargs[where]):
                self.watch(tensor, kind)
        if op.name() in self.scratch:
            self.died(self.born(self.scratch[op.name()](*args), "kernel scratch"))
        return result

    def _blocks(self, args) -> list[Block]:
        """The arguments' storages. (Constants are not counted.)"""
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        return [entry[1] for x in tensors if (entry := self._living.get(x.untyped_storage()._cdata))]

    def _without_numbers(self, op, args):
        """What fake tensors are asked and cannot know. A number: finite, not zero where it counts tokens (fp64: those of all
        processes). How many positions have a label: all, the most it can be, or as many as the caller knows of."""
        number = op is torch.ops.aten._local_scalar_dense.default
        masked = op is torch.ops.aten.index.Tensor and args[1][0].dtype == torch.bool
        if not (number or masked) or not any(isinstance(x, FakeTensor) for x in tree_leaves(args)):
            return None
        if number:
            return {torch.bool: True, torch.int64: 1, torch.float64: 1.0}.get(args[0].dtype, 0.0)
        return args[0][: self.supervised].clone()


def follow(recorder, model, optimizer, in_backward: bool = False) -> None:
    """Have the phases of every step recorded, layer by layer, and gradients and optimizer state known as such. in_backward: the
    optimizer steps a weight where its gradient is made, in the phases of backward; it has none of its own."""

    def mark(name, tensor=None):
        if recorder.phase.startswith("backward"):  # gradient checkpointing computes the block again
            return
        if tensor is None:
            recorder.begin(name)
        elif tensor.requires_grad:
            tensor.register_hook(lambda gradient: recorder.begin(name))  # called when this gradient is complete

    def graded(weight):
        if weight.grad is not None:
            recorder.watch(weight.grad, "gradients")

    def stepping(*_):
        for weight in trained:
            graded(weight)
        if not in_backward:
            recorder.begin("optimizer")

    def stepped(*_):
        for weight, state in optimizer.state.items():
            for value in filter(torch.is_tensor, state.values()):
                recorder.watch(value, "optimizer state", layers[weight])

    layers = {weight: layer_of(name) for name, weight in model.named_parameters()}
    trained = [weight for weight in layers if weight.requires_grad]
    first = {"prepend": True}  # before FSDP gathers the weights, so that this belongs to the phase
    model.register_forward_pre_hook(lambda *_: recorder.begin("forward embedding"), **first)
    for i, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: mark(f"forward {i}"), **first)
        layer.register_forward_hook(lambda _, args, output, i=i: mark(f"backward {i}", output), **first)
    model.layers[0].register_forward_hook(lambda _, args, output: mark("backward embedding", args[0]), **first)
    model.norm.register_forward_pre_hook(lambda *_: mark("loss"))
    for weight in trained:
        weight.register_post_accumulate_grad_hook(graded)
    optimizer.register_step_pre_hook(stepping)
    optimizer.register_step_post_hook(stepped)


# ---------------------------------------------------------------------------------------------------------------------
# Reading the diary


@dataclass
class Phase:
    """A stretch of a run, and the bytes of each kind at its start, at its own peak, at its end, and when its work took most."""

    part: str  # load, first step, second step, evaluation, save
    name: str  # forward 0, loss, backward 0, optimizer, ...
    start: Counter
    peak: Counter
    end: Counter
    busiest: Counter  # the peak, but for what FSDP sends and receives meanwhile
    most: Counter  # the most of each kind of that, and of gradients

    @property
    def layer(self) -> int | None:
        return layer_of(self.name)

    @property
    def moments(self) -> tuple[Counter, Counter, Counter]:
        return self.start, self.peak, self.end

    @property
    def rise(self) -> int:
        return unsent(self.busiest) - unsent(self.start)

    @property
    def kept(self) -> int:
        return unsent(self.end) - unsent(self.start)


def unsent(moment: Counter) -> int:
    """Bytes of a moment without what is sent."""
    return moment.total() - sum(moment[kind] for kind in SENT)


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
    phases, live, total, highest, mine, most, peak, tails, away, host = [], Counter(), 0, 0, 0, 0, 0, 0, 0, 0
    for what, block in diary:
        if what == 0:
            if phases:
                phases[-1].end = live.copy()
            phases.append(Phase(*block, *(live.copy() for _ in range(5))))
            highest, most = total, mine  # in this phase
            continue
        if block.away:
            away += what * block.bytes
            host = max(host, away)
            continue
        size = -(-block.bytes // 512) * 512 if gpu else block.bytes
        kind = kind_of(block)
        live[kind] += what * size
        total += what * size
        mine += what * size * (kind not in SENT)
        if kind in (*SENT, "gradients"):
            phases[-1].most |= Counter({kind: live[kind]})
        if allocator:
            allocator.allocate(block) if what == 1 else allocator.free(block)
            if total > peak:
                peak, tails = total, allocator.allocated - total
        if total > highest or mine > most:
            now = live.copy()
            if total > highest:
                highest, phases[-1].peak = total, now
            if mine > most:
                most, phases[-1].busiest = mine, now
    return Timeline(phases[:-1], host, tails, allocator and allocator.reserved)  # the last is only the end


def kind_of(block: Block) -> str:
    """What is not known as weight, gradient, ... is an activation if forward left it behind, else it came and went."""
    if block.kind or block.born == "loss":
        return block.kind or "logits and loss"
    return "activations" if block.born.startswith("forward") and block.died != block.born else "temporary"


# ---------------------------------------------------------------------------------------------------------------------
# Prediction and measurement


def perform(run, recorder, prepare) -> None:
    """Build the run, then two steps, an evaluation and a save of it. prepare(model): what there is before the first step."""
    recorder.part = "load"
    recorder.begin("load")
    model, optimizer = run.build()
    prepare(model)
    follow(recorder, model, optimizer, run.config.optimizer_in_backward)
    for recorder.part in ("first step", "second step"):
        run.step()
        recorder.begin("between steps")
    for recorder.part, work in (("evaluation", run.evaluate), ("save", run.save)):
        recorder.begin(recorder.part)
        work()
    recorder.begin("end")


def watch(run, dry: bool) -> Tracker:
    """Perform the run inside a tracker. dry: on fake tensors."""

    def prepare(model):
        for name, weight in model.named_parameters():
            tracker.watch(weight, "adapters" if "lora_" in name else "weights", layer_of(name))
        for tensor in run.row.values():
            tracker.watch(tensor, "batch")
        if run.processes > 1 and not run.config.fsdp:
            tracker.rest("gradients")  # the buckets in which DDP has them
        for _ in range(2 if run.gpu else 0):
            tracker.born(run.gpu.workspace, "cuBLAS workspace")

    run.connect()
    fake = FakeTensorMode(allow_non_fake_inputs=True) if dry else nullcontext()
    scratch = (SCRATCH if run.gpu else {}) | (OFFLOADED if run.config.cpu_offload and dry else {})
    away = KEPT if run.config.cpu_offload and dry else ()
    fused = patch.multiple("torch.nn.functional", rms_norm=FusedNorm.apply, dropout=fused_dropout)  # CUDA's kernels
    with fake, fused if run.gpu else nullcontext(), Tracker(scratch, run.supervised if dry else None, away) as tracker:
        perform(run, tracker, prepare)
    return tracker


def predict(run) -> Timeline:
    """The timeline of a run on fake tensors. run: a dataclass with the model's `sizes`, the `gpu` that it is to be as on (None: a
    CPU), how many `processes` share the work, train.py's `config`, `row`, the tensors of a micro-batch, how many of its
    positions are `supervised` (None: all), and with `connect()` (what needs numbers: the mesh of the processes), `build()` ->
    (model, optimizer), `step()`, `evaluate()`, `save()`."""
    n = run.sizes.n_layers
    few = replace(run, sizes=replace(run.sizes, n_layers=min(n, FEW)))
    with processes(run.processes) if run.processes > 1 else nullcontext():
        diary = watch(few, True).diary
    return timeline(deepen(diary, n) if n > FEW else diary, run.gpu)


class Gauge:
    """What `follow` reports to on a GPU: every phase with the allocator's own figures, which are free to ask for."""

    def __init__(self):
        self.part = self.phase = ""
        self.phases: list[Phase] = []

    def begin(self, phase: str) -> None:
        now = Counter(allocated=torch.cuda.memory_allocated())
        if self.phases:
            last = self.phases[-1]
            last.peak = last.busiest = Counter(allocated=torch.cuda.max_memory_allocated())
            last.end = now
        torch.cuda.reset_peak_memory_stats()
        self.phase = phase
        self.phases.append(Phase(self.part, phase, *[now] * 5))

    def watch(self, *_) -> None:
        pass  # the allocator knows sizes, not kinds


def measure(run, device: torch.device) -> Timeline:
    """The same run on real tensors: counted by the tracker on a CPU, by the allocator on a GPU."""
    if device.type != "cuda":
        return timeline(watch(run, False).diary)
    torch.cuda.empty_cache()
    run.connect()
    perform(run, gauge := Gauge(), lambda model: None)
    return Timeline(gauge.phases[:-1], reserved=torch.cuda.memory_reserved())  # it is never given back by itself


# ---------------------------------------------------------------------------------------------------------------------
# The program


def main():
    """Its answers are in sizing/pages.py, which knows train.py; its build and step come from sizing/rehearsal.py."""
    from sizing.pages import answer  # here, as it imports this file

    try:
        answer(sys.argv[1:])
    except BrokenPipeError:
        sys.stderr.close()  # `| head` has seen enough
    except (ValueError, OSError) as error:
        print(f"memory.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    import memory  # the module that train.py and sizing/ import, not a second copy of it

    memory.main()
