"""One of many processes, alone: what a rank of 512 holds is counted on a machine that has none of the others.

FSDP keeps 1/N of every weight, gathers a block into a buffer before its turn, gives that back by shrinking its storage to
nothing, and lets it grow again for backward; gradients leave through a buffer as well. Those are births and deaths that no
operation tells of: `told` does. `processes` is the group of which there is only this one.
"""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.utils._python_dispatch import _disable_current_modes

MOVED = {  # FSDP's operations on what it sends and receives: which argument that is, and what
    "fsdp::all_gather_copy_in": (1, "gathered weights"),
    "fsdp::split_with_sizes_copy": ("out", "gathered weights"),
    "fsdp::chunk_cat": ("out", "gradients to reduce"),
}
OFFLOADED = {"fsdp::all_gather_copy_in": lambda shards, *_: sum(shard.nbytes for shard in shards)}  # brought to the GPU first


def told(tracker) -> ExitStack:
    """Until it is closed the tracker is told of a storage that is resized and of weights that are cut into shards, and not of
    the fake tensors that a tensor in shards tries its operations on first, which are no memory."""

    def resize(storage, size):
        torch._C.StorageBase.resize_(storage, size)
        tracker.resized(storage, size)

    def sharded(parameter, *args, original=FSDPParam._init_sharded_param):
        original(parameter, *args)
        tracker.watch(parameter._sharded_param_data, tracker.away[0] if tracker.away else None)

    def tried(*args, original=ShardingPropagator._propagate_tensor_meta_non_cached):
        with _disable_current_modes():
            return original(*args)

    patched = ExitStack()
    patched.enter_context(patch.object(torch.UntypedStorage, "resize_", resize))
    patched.enter_context(patch.object(FSDPParam, "_init_sharded_param", sharded))
    patched.enter_context(patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", tried))
    return patched


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

    real, world = dist.group.WORLD, dist.distributed_c10d._world
    named = world.group_count  # by which all processes call their next group: no number of theirs is used here
    if real:  # train.py's own: it waits
        world.group_count += 10**6 * len(world.pg_names)
        dist.group.WORLD = dist.new_group(list(range(count)), backend="fake", use_local_synchronization=True)
    else:
        dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    ddp = {"_verify_param_shape_across_processes": lambda *_: None, "_sync_module_states": lambda **_: None}
    try:
        with patch.object(dist, "Reducer", Reducer), patch.multiple("torch.nn.parallel.distributed", **ddp):
            yield
    finally:
        _clear_sharding_prop_cache()  # what was worked out for these processes would be used for a real group of the same size
        if real:
            dist.group.WORLD, world.group_count = real, named
        else:
            dist.destroy_process_group()
