"""What a GPU adds to the tensors that a program asks for, and what fake tensors cannot show of it.

    allocated   every size in whole blocks of 512 bytes, and rests too small to be cut off; cuBLAS's workspace; kernels' scratch
    reserved    the segments that these blocks are cut from, which are never given back
    nvidia-smi  reserved + the CUDA context: the driver's and the kernels' own memory

Each is a term with a name. None is a factor that makes a sum come out right.
"""

import re
from collections import defaultdict
from dataclasses import dataclass

import torch


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

    def allocate(self, block) -> None:
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

    def free(self, block) -> None:
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
    def varlen(self) -> bool:
        """Whether flash attention takes all documents of a row at once: since Ampere (model.py's has_varlen)."""
        return self.dtype == "bf16"

    @property
    def workspace(self) -> int:
        """What cuBLAS takes for each thread that multiplies: forward's and backward's."""
        return 2**25 if self.hopper else 2 * 2**22 + 16 * 2**13

    @classmethod
    def here(cls, device: torch.device) -> "GPU":
        found = torch.cuda.get_device_properties(device)
        return cls(found.name, found.total_memory, hopper=found.major >= 9, dtype="bf16" if found.major >= 8 else "fp16")


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
    if (size := re.fullmatch(r"(\d+(?:\.\d+)?)GB", name, re.IGNORECASE)) and float(size[1]):
        return GPU(name, int(float(size[1]) * 1e9))
    raise ValueError(f"unknown GPU {name!r}: known are {', '.join(GPUS)}, or a size such as 80GB")


def flash_scratch(grad, q, k, v, out, lse, cu_seqlens, *_) -> int:
    """Bytes that flash attention's backward takes for itself: dQ is summed in fp32, and one fp32 number a row, T rows and 128
    for each document (FlashAttention-2's varlen backward)."""
    (tokens, heads, size), documents = q.shape, len(cu_seqlens) - 1
    return (tokens + 128 * documents) * heads * (-(-size // 32) * 32 + 1) * 4


def efficient_scratch(grad, q, *_) -> int:
    """The same of the kernel for one document that fp32, and GPUs before Ampere, go by: dQ for whole blocks of 64 rows."""
    _, heads, tokens, size = q.shape
    return (-(-tokens // 64) * 64 * size + tokens) * heads * 4


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


def fused_dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """What CUDA's dropout keeps: a byte a number, what was zeroed. A CPU's keeps a factor as wide as the number."""
    return torch.native_dropout(x, p, training)[0] if training and p else x


SCRATCH = {
    "torch_attn::_varlen_attn_backward": flash_scratch,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": efficient_scratch,  # its place on fake tensors
}
