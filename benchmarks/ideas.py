"""What each idea brings, alone: the plain formula beside what this project does, on the same inputs.

    python benchmarks/ideas.py [--device cuda] [--tokens 1024] [--preset 125m]

Forward and backward of one operation at the preset's sizes in bf16: the two in turns, the fastest of several rounds, and the
bytes that live at their peak beside the inputs (counted by memory.py's tracker, on CUDA by the allocator). That both compute the
same is shown by the largest difference between their results and gradients, in units of the largest value."""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from lora import LoRALinear  # noqa: E402
from memory import Tracker  # noqa: E402
from model import PRESETS, RMSNorm, SwiGLU, apply_rope, attention_over_documents, rope_table, summed_loss  # noqa: E402
from quant import NF4_CODE, PackedNF4, dequantize_blockwise, dequantize_nf4, quantize_nf4  # noqa: E402


def all_logits(head, x, labels):
    return F.cross_entropy(head(x).float(), labels, reduction="sum")


def rotated(cos, sin, x):
    """Rotary embedding as most write it: sines and cosines, each pair by hand."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def normed(x, weight, eps):
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def adapted(base, a, b, scaling, x):
    return base(x) + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scaling


def fused(borders, *qkv):
    """Attention by PyTorch's kernel, a document at a time."""
    parts = zip(*(x.transpose(0, 1).split(borders.diff().tolist(), dim=1) for x in qkv), strict=True)
    one = partial(F.scaled_dot_product_attention, is_causal=True)
    return torch.cat([one(*(x[None] for x in document))[0].transpose(0, 1) for document in parts])


def made_at_once(packed: PackedNF4, dtype):
    codes = torch.stack((packed.data >> 4, packed.data & 15), dim=-1).flatten()
    return dequantize_blockwise(codes, packed.scales(), NF4_CODE, 64).to(dtype).view(packed.shape)


def ideas(preset: str, tokens: int, device: str):
    """(name, shape, the plain way, the way here, inputs): both ways are functions of the inputs."""
    sizes = PRESETS[preset]
    dim, hidden, heads, bf16 = sizes.dim, sizes.hidden_dim, sizes.n_heads, torch.bfloat16

    def random(*shape, dtype=bf16, grad=True):
        return torch.randn(shape, device=device).to(dtype).requires_grad_(grad)

    head = nn.Linear(dim, sizes.vocab_size, bias=False, device=device, dtype=bf16).requires_grad_(False)
    labels = torch.randint(sizes.vocab_size, (tokens,), device=device)
    x, wide = (tokens, dim), (tokens, hidden)
    yield (
        "the loss in chunks, its gradient found with it",
        f"{tokens} x {sizes.vocab_size}",
        partial(all_logits, head),
        lambda x, labels: summed_loss(x, head, labels),
        (random(*x), labels),
    )

    table = rope_table(torch.arange(tokens, device=device), sizes)
    yield (
        "RoPE as one complex product",
        f"{tokens} x {heads} x {sizes.head_dim}",
        partial(rotated, table.real.contiguous(), table.imag.contiguous()),
        lambda x: apply_rope(x, table),
        (random(tokens, heads, sizes.head_dim),),
    )

    norm = RMSNorm(dim, 1e-5).to(device, bf16)
    norm.requires_grad_(False)
    yield "RMSNorm by F.rms_norm", f"{tokens} x {dim}", lambda x: normed(x, norm.weight, 1e-5), norm, (random(*x),)

    gate_up = (random(*wide), random(*wide))
    yield "SwiGLU that keeps two tensors", f"{tokens} x {hidden}", lambda g, u: F.silu(g) * u, SwiGLU.apply, gate_up

    base = nn.Linear(dim, hidden, bias=False, device=device, dtype=bf16).requires_grad_(False)
    lora = LoRALinear(base, 8, 16.0, 0.0, False, device=device)
    nn.init.normal_(lora.lora_B, std=0.02)
    trained = random(*x), lora.lora_A, lora.lora_B
    ways = (lambda x, a, b: adapted(base, a, b, lora.scaling, x)), (lambda x, a, b: lora(x))
    yield "LoRA scaled where it is thin, added within the product", f"{tokens} x {dim} x {hidden}", *ways, trained

    borders = torch.tensor([0, tokens // 2, tokens], dtype=torch.int32, device=device)
    qkv = [random(tokens, heads, sizes.head_dim) for _ in range(3)]
    ways = (lambda q, k, v, how=how: attention_over_documents(q, k, v, borders, how) for how in ("textbook", "sdpa"))
    yield "attention without the matrix of scores, two documents", f"{tokens} x {heads} x {sizes.head_dim}", *ways, qkv

    if device == "cpu":
        ways = partial(fused, borders), lambda q, k, v: attention_over_documents(q, k, v, borders, "sdpa")
        yield "the same beside PyTorch's kernel", f"{tokens} x {heads} x {sizes.head_dim}", *ways, qkv

    packed, row = quantize_nf4(torch.randn(hidden, dim, device=device)), random(1, 1, grad=False)
    ways = (lambda row, make=make: make(packed, bf16) * row for make in (made_at_once, dequantize_nf4))
    yield "an NF4 weight made again piece by piece, two at a time", f"{hidden} x {dim}", *ways, (row,)

    weight, grad = (random(hidden, dim, dtype=torch.float32, grad=False) for _ in range(2))
    steps = [torch.optim.AdamW([weight.clone().requires_grad_()], fused=fused, foreach=False) for fused in (False, True)]

    def step(optimizer, grad):
        (weight,) = optimizer.param_groups[0]["params"]
        weight.grad = grad
        optimizer.step()
        return weight.detach()

    yield "AdamW in one pass", f"{hidden} x {dim}, fp32", *(partial(step, optimizer) for optimizer in steps), (grad,)


def once(way, inputs) -> list[torch.Tensor]:
    """The result, and the gradients of the inputs that have one."""
    out = way(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    grads = torch.autograd.grad(out, wanted, torch.ones_like(out)) if out.requires_grad else []
    return [out.detach(), *grads]


def peak(way, inputs, device: str) -> int:
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        once(way, inputs)
        return torch.cuda.max_memory_allocated() - before
    with Tracker() as counted:
        for x in inputs:
            counted.watch(x)
        before = counted.live
        once(way, inputs)
    return counted.peak - before


def main():
    parser = argparse.ArgumentParser(description="What each idea brings, alone.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", choices=PRESETS, default="125m")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.device}, {options.preset}, bf16\n")
    print("| idea | sizes | plainly, ms | here, ms | faster by | plainly, MB | here, MB | largest difference |")
    print("|---|---|---|---|---|---|---|---|")
    torch.manual_seed(0)
    for name, shape, *ways, inputs in ideas(options.preset, options.tokens, options.device):
        pairs = zip(*(once(way, inputs) for way in ways), strict=True)
        apart = max(((a.float() - b.float()).abs().max() / a.float().abs().max()).item() for a, b in pairs)
        best = [float("inf")] * 2
        for _ in range(options.rounds):
            for i, way in enumerate(ways):
                began = time.perf_counter()
                once(way, inputs)[0].flatten()[0].item()  # waits for the GPU
                best[i] = min(best[i], 1000 * (time.perf_counter() - began))
        megabytes = [f"{peak(way, inputs, options.device) / 1e6:.1f}" for way in ways]
        times = [f"{best[0]:.2f}", f"{best[1]:.2f}", f"{best[0] / best[1]:.2f}"]
        print("| " + " | ".join([name, shape, *times, *megabytes, f"{apart:.4f}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
