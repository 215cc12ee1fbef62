"""A step of the 8-bit AdamW on a GPU in one pass over weight, gradient and moments: in plain PyTorch it takes some forty.

quant.py has the plain lines that this kernel equals, and calls it."""

import triton
import triton.language as tl


@triton.jit
def _nearest(value, middles):
    """The level nearest to each value, by number: how many of the 255 middles between levels lie below. Halving, 8 times."""
    index = tl.zeros(value.shape, dtype=tl.int32)
    for i in tl.static_range(8):
        higher = index + (128 >> i)
        index = tl.where(tl.load(middles + higher - 1) < value, higher, index)
    return index


@triton.jit(do_not_specialize=["seed"])  # one kernel for all steps
def adamw_kernel(
    weight, grad, mean, square, mean_absmax, square_absmax, signed, signed_middles, unsigned, unsigned_middles,
    n, keep, beta1, beta2, rate, correction, eps, seed, ROUND: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """B blocks of 256 weights a program: unpacked, stepped and packed again, each number read and written once."""
    block = tl.program_id(0) * B + tl.arange(0, B)
    at = block[:, None].to(tl.int64) * 256 + tl.arange(0, 256)[None, :]
    inside, full = at < n, block * 256 < n
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(signed + tl.load(mean + at, mask=inside, other=0).to(tl.int32))
    v = tl.load(unsigned + tl.load(square + at, mask=inside, other=0).to(tl.int32))
    m = m * tl.load(mean_absmax + block, mask=full, other=0.0)[:, None]
    v = v * tl.load(square_absmax + block, mask=full, other=0.0)[:, None]
    m = tl.where(inside, m + (1 - beta1) * (g - m), 0.0)
    v = v * beta2 + (1 - beta2) * g * g
    w = w * keep - rate * m / (tl.sqrt(v / correction) + eps)
    if ROUND:  # stochastic_round's two lines
        noise = tl.randint(seed, at.to(tl.int32)).to(tl.int32, bitcast=True) & 0xFFFF
        w = ((w.to(tl.int32, bitcast=True) + noise) & -65536).to(tl.float32, bitcast=True)
    tl.store(weight + at, w.to(weight.dtype.element_ty), mask=inside)
    scale = tl.max(tl.abs(m), axis=1)
    tl.store(mean_absmax + block, scale, mask=full)
    index = _nearest(m * (1 / tl.maximum(scale, 1e-38))[:, None], signed_middles)
    tl.store(mean + at, index.to(tl.uint8), mask=inside)
    scale = tl.max(v, axis=1)
    tl.store(square_absmax + block, scale, mask=full)
    index = _nearest(v * (1 / tl.maximum(scale, 1e-38))[:, None], unsigned_middles)
    tl.store(square + at, tl.where(v > 0, tl.maximum(index, 1), index).to(tl.uint8), mask=inside)
