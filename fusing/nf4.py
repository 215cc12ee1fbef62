"""NF4 on a GPU: a weight made again in one pass, and the product of a packed weight with one row or a few, which never makes it.

quant.py has the plain lines these kernels equal, says what their arguments hold, and calls them."""

import triton
import triton.language as tl


@triton.jit
def _scale_of(block, inside, absmax, nested, offset, dynamic, NESTED: tl.constexpr):
    """The absmax of blocks by their number, fp32. NESTED: how many share a nested scale; 0 without double quantisation."""
    if NESTED:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        group = tl.load(nested + block // NESTED, mask=inside, other=0.0)
        scale = tl.load(dynamic + code) * group + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    return scale  # the one return: a compiled kernel may not return bytes here and fp32 there


@triton.jit
def dequantize_kernel(data, absmax, nested, offset, levels, dynamic, out, blocks, NESTED: tl.constexpr, B: tl.constexpr):
    """B blocks of 64 a program: bytes (B, 32) -> weights (B, 64). The scales are made on the way and never stored."""
    block = tl.program_id(0) * B + tl.arange(0, B)
    inside = block < blocks
    scale = _scale_of(block, inside, absmax, nested, offset, dynamic, NESTED)[:, None]
    at = block[:, None].to(tl.int64) * 32 + tl.arange(0, 32)[None, :]
    byte = tl.load(data + at, mask=inside[:, None], other=0).to(tl.int32)
    high, low = tl.load(levels + (byte >> 4)) * scale, tl.load(levels + (byte & 15)) * scale
    at = block[:, None].to(tl.int64) * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + at, tl.interleave(high, low).to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def matvec_kernel(
    x, words, absmax, nested, offset, levels, dynamic, out, N, K, NESTED: tl.constexpr, BN: tl.constexpr, WORDS: tl.constexpr
):
    """out (N,) = W x, BN of W's N rows a program, WORDS x 8 of its K columns at a time.

    A GPU reads 4 bits a weight faster than it makes numbers of them, so what counts is how few instructions a weight takes: it is
    cut out of its word of 32 bits, looked up, multiplied. The scale is one more for eight of them."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n[:, None] < N
    total = tl.zeros((BN, WORDS), dtype=tl.float32)
    for start in range(0, K // 8, WORDS):
        at = start + tl.arange(0, WORDS)
        word = tl.load(words + n[:, None] * (K // 8) + at[None, :], mask=inside, other=0)
        part = tl.zeros((BN, WORDS), dtype=tl.float32)
        for i in tl.static_range(8):  # of a byte the high half is first: the second four bits, the first, the fourth, ...
            level = tl.load(levels + ((word >> (i ^ 1) * 4) & 15))
            part += level * tl.load(x + 8 * at + i).to(tl.float32)[None, :]
        block = n[:, None] * (K // 64) + at[None, :] // 8
        total += part * _scale_of(block, inside, absmax, nested, offset, dynamic, NESTED)
    tl.store(out + n, tl.sum(total, axis=1).to(out.dtype.element_ty), mask=n < N)


@triton.jit
def few_rows_kernel(
    x, data, absmax, nested, offset, levels, dynamic, out,
    rows, N, K, NESTED: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """out (rows, N) = x (rows, K) @ W^T for 2 to 16 rows, BN of W's N rows a program, 2 x BYTES of its K columns at a time.

    A byte holds an even and an odd column, so x is read as its even and its odd columns and nothing is put side by side.
    The up to 16 rows of x are the narrow side of the tensor cores' smallest product."""
    n, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, 16)
    total = tl.zeros((BN, 16), dtype=tl.float32)
    for start in range(0, K // 2, BYTES):
        at = start + tl.arange(0, BYTES)
        byte = tl.load(data + n[:, None].to(tl.int64) * (K // 2) + at[None, :], mask=n[:, None] < N, other=0).to(tl.int32)
        block = n[:, None] * (K // 64) + start // 32 + tl.arange(0, BYTES // 32)[None, :]
        scale = _scale_of(block, n[:, None] < N, absmax, nested, offset, dynamic, NESTED)
        scale = tl.broadcast_to(scale[:, :, None], (BN, BYTES // 32, 32)).reshape(BN, BYTES)
        high = (tl.load(levels + (byte >> 4)) * scale).to(x.dtype.element_ty)
        low = (tl.load(levels + (byte & 15)) * scale).to(x.dtype.element_ty)
        at = m[None, :] * K + 2 * at[:, None]
        total += tl.dot(high, tl.load(x + at, mask=m[None, :] < rows, other=0.0), input_precision=PRECISION)
        total += tl.dot(low, tl.load(x + at + 1, mask=m[None, :] < rows, other=0.0), input_precision=PRECISION)
    inside = (m[None, :] < rows) & (n[:, None] < N)
    tl.store(out + m[None, :] * N + n[:, None], total.to(out.dtype.element_ty), mask=inside)
