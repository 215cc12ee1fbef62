import weakref
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Block:
    """One storage: its bytes, the phase it was born in, and what it turned out to be (None: nothing that stays)."""

    __slots__ = ("born", "bytes", "kind")

    def __init__(self, size: int, born: str):
        self.bytes, self.born, self.kind = size, born, None


class Tracker(TorchDispatchMode):
    """Follows the birth and death of every storage while PyTorch works, on real tensors or on fake ones."""

    def __init__(self, scratch=None):
        super().__init__()
        self.live = self.peak = 0
        self.phase = ""
        self.diary: list[tuple] = []  # ("phase", name), (+1, block), (-1, block)
        self.scratch = scratch or {}
        self._living: dict[int, tuple] = {}  # address of a storage -> (weak reference, its block)

    def begin(self, phase: str) -> None:
        self.phase = phase
        self.diary.append((0, phase))

    def watch(self, tensor: torch.Tensor, kind: str | None = None) -> None:
        """Count the tensor's storage, once however many views it has, until it dies; and say what it is, if that is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._living:
            block = Block(storage.nbytes(), self.phase)

            def gone(_):
                del self._living[key]
                self.live -= block.bytes
                self.diary.append((-1, block))

            self._living[key] = weakref.ref(storage, gone), block
            self.live += block.bytes
            self.peak = max(self.peak, self.live)
            self.diary.append((+1, block))
        if kind:
            self._living[key][1].kind = kind

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = self._without_values(op, args)
        if result is None:
            result = op(*args, **kwargs)
        if not op.is_view:
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                    self.watch(tensor)
        for size in self.scratch.get(op.name(), lambda *_: ())(*args):
            block = Block(size, self.phase)
            self.diary += [(+1, block)]
        return result

    @staticmethod
    def _without_values(op, args):
        """What a fake tensor cannot tell, for it has no numbers"""
        if not any(isinstance(x, FakeTensor) for x in tree_leaves(args)):
            return None
        if op is torch.ops.aten._local_scalar_dense.default:
            return {torch.bool: True, torch.int64: 1}.get(args[0].dtype, 0.0)
        if op is torch.ops.aten.index.Tensor and args[1][0].dtype == torch.bool:
            return args[0].clone()
        return None

    def follow(self, model, optimizer) -> None:
        """Name the phases of a step, layer by layer, and know gradients and optimizer state when they are made."""
        last = len(model.layers) - 1

        def forward_begins(i):
            def hook(*_):
                if not self.phase.startswith("backward"):  # there gradient checkpointing computes the block again
                    self.begin(f"forward {i}")
            return hook

        def forward_ends(i):
            def hook(_, args, output):
                if self.phase.startswith("backward"):
                    return
                if output.requires_grad:
                    output.register_hook(lambda grad: self.begin(f"backward {i}"))
                if i == 0 and args[0].requires_grad:
                    args[0].register_hook(lambda grad: self.begin("backward embedding"))
                if i == last:
                    self.begin("loss")
            return hook

        model.register_forward_pre_hook(lambda *_: self.begin("forward embedding"))
        for i, layer in enumerate(model.layers):
            layer.register_forward_pre_hook(forward_begins(i))
            layer.register_forward_hook(forward_ends(i))
        for weight in model.parameters():
            trained = weight.requires_grad
            if trained:
                weight.register_post_accumulate_grad_hook(lambda weight: self.watch(weight.grad, "gradients"))
        optimizer.register_step_pre_hook(lambda *_: self.begin("optimizer"))
        def after(*_):
            for state in optimizer.state.values():
                for value in state.values():
                    if isinstance(value, torch.Tensor): self.watch(value, "optimizer state")
            self.begin("between steps")
        optimizer.register_step_post_hook(after)


def predict(run, steps=2, dry=True):
    with FakeTensorMode(allow_non_fake_inputs=True) if dry else nullcontext(), Tracker() as tracker:
        tracker.begin("load")
        model, optimizer = run.build()
        for t in run.row.values(): tracker.watch(t, 'batch')
        for name, w in model.named_parameters():
            tracker.watch(w, "adapters" if "lora_" in name else "weights")
        tracker.follow(model, optimizer)
        for _ in range(steps):
            run.step()
        tracker.begin("evaluation")
        run.evaluate()
        tracker.begin("end")
    return tracker
