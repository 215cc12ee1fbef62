"""Quantisation: frozen weights in 4 or 8 bits, and an AdamW whose moments take 8 ("QLoRA", Dettmers et al. 2023, section 3).

A pretrained weight matrix, cut into blocks of 64, is nearly normal in each. NF4 therefore keeps, per block, the largest absolute
value, and per weight one of 16 levels, spaced as the quantiles of a normal distribution are: dense near 0, sparse at the ends.

    absmax = max |w|  over the block        code = nearest level to w / absmax        w' = level[code] x absmax

4 bits a weight and 32 / 64 for absmax make 4.5. Double quantisation stores the absmax themselves in 8 bits (their mean is taken
off first, then 256 of them make a block) and leaves 4 + 8/64 + 32/(64 x 256) = 4.127 bits:
the linears of 7B's blocks take 3.3 GB instead of 13.0. The mean squared error on normal data is 0.0085 of the variance.

Such weights are not trained: for every product they are turned back into 16 bits, used, and forgotten, in forward and again
in backward. So a QLoRA step needs less memory than a LoRA step, and more time: two more passes over the weights.

The bytes are those of bitsandbytes, here and in its files (weights/bitsandbytes.py), but for about 0.2 % of the double-quantised
scales, which its compiled CPU path rounds to the level beside the nearest. The plain PyTorch lines define what is computed; on a
GPU Triton kernels (fusing/) do the same faster."""

import math
import os
from contextlib import suppress
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

triton = None  # the plain lines serve
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    with suppress(ImportError):
        import triton

        from fusing.adamw import adamw_kernel
        from fusing.nf4 import dequantize_kernel, few_rows_kernel, matvec_kernel

BLOCK = 64  # weights that share one absmax
NESTED_BLOCK = 256  # absmax values that share one scale of their own


class QuantError(ValueError):
    """Weights that cannot be quantised."""


# ---------------------------------------------------------------------------------------------------------------------
# The two code books


def normal_levels() -> torch.Tensor:
    """The 16 levels of NF4, fp32 in [-1, 1]: 8 quantiles of the positive half of N(0, 1), 7 of the negative half, and 0.

    The outermost quantile is not at 1 (that would be infinite) but half a step inside, 1 - (1/30 + 1/32) / 2, rounded to the
    seven digits that QLoRA's authors published. Float32 and float64 stand where theirs did: the levels are equal to the bit."""
    outermost = 0.9677083
    positive = torch.special.ndtri(torch.linspace(outermost, 0.5, 9)[:-1].double())
    negative = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8)[:-1].double())
    levels = torch.cat([negative, torch.zeros(1), positive]).sort().values.float()
    return levels / levels.max()


def dynamic_levels(signed: bool) -> torch.Tensor:
    """The 256 levels of the dynamic 8-bit map, fp32 ("8-bit Optimizers via Block-wise Quantization", section 1.3).

    Seven decades from 1e-7 to 1; each larger decade has twice the levels of the one below, at the middles of equal
    parts of it. So of the smallest values little more than the decade is kept, of the largest two digits."""
    levels = [0.0, 1.0]
    for i in range(7):
        parts = 2**i if signed else 2 ** (i + 1)
        edges = torch.linspace(0.1, 1, parts + 1)
        middles = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += middles.tolist() + (-middles).tolist() * signed
    return torch.tensor(sorted(levels))


NF4_CODE = normal_levels()
DYNAMIC_CODE = dynamic_levels(signed=True)
UNSIGNED_CODE = dynamic_levels(signed=False)

# Byte -> its two levels, side by side as one 8-byte number: one look-up unpacks two weights.
_PAIRS = torch.stack([NF4_CODE.repeat_interleave(16), NF4_CODE.repeat(16)], dim=1).view(torch.int64).flatten()


@cache
def on_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """One of these tables, brought to a GPU once: a CUDA graph cannot record a copy from the host's memory."""
    return table.to(device)


# Floats with the same upper 16 bits lie so close together that among them is at most one middle (between two levels). So for each
# such half: how many middles are below the smallest float that has it (a negative one's lower bits are all set), and with that
# below all of them. One comparison then tells whether the one in doubt is.
_UPPER = torch.arange(-(2**15), 2**15, dtype=torch.int32) * 2**16
_SMALLEST = torch.where(_UPPER < 0, _UPPER | 0xFFFF, _UPPER).view(torch.float32)
_MIDDLES = {code: (code[:-1] + code[1:]) / 2 for code in (NF4_CODE, DYNAMIC_CODE, UNSIGNED_CODE)}
_BELOW = {code: torch.bucketize(_SMALLEST, between).to(torch.uint8) for code, between in _MIDDLES.items()}


def nearest_level(x: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """The number of the level nearest to each x (n,), fp32: (n,) uint8; ties go to the lower. A look-up instead of a search."""
    middles = (code[:-1] + code[1:]) / 2
    if x.is_cuda or code not in _BELOW:  # a GPU searches as fast
        return torch.bucketize(x, middles.to(x.device)).to(torch.uint8)
    below = _BELOW[code].index_select(0, (x.view(torch.int32) >> 16) + 2**15)
    return below + (x > F.pad(middles, (0, 1), value=math.inf).index_select(0, below.int()))


def quantize_blockwise(x: torch.Tensor, code: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest level for each value of x (any shape, read flat, fp32): uint8 indices (n,) and absmax fp32 (blocks,).

    Every block of `block` values is divided by its own absmax first; the last may be shorter. Ties go to the lower level."""
    flat, ragged = x.flatten().float(), x.numel() % block
    rows = (F.pad(flat, (0, block - ragged)) if ragged else flat).view(-1, block)
    absmax = rows.abs().amax(dim=1)
    divisor = absmax.clamp(min=1e-38)[:, None]
    scaled = rows * (1 / divisor)
    if ragged:  # as bitsandbytes does, to the last bit: it divides a block that is not full, and multiplies the others
        scaled[-1] = rows[-1] / divisor[-1]
    return nearest_level(scaled.flatten(), code)[: flat.numel()], absmax


def dequantize_blockwise(indices: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, block: int) -> torch.Tensor:
    """The inverse: fp32 (n,)."""
    scale = absmax.repeat_interleave(block)[: indices.numel()]
    return on_device(code, indices.device).index_select(0, indices.int()).mul_(scale)


# ---------------------------------------------------------------------------------------------------------------------
# NF4


class PackedNF4(NamedTuple):
    """A weight in NF4. Double quantisation makes absmax indices into DYNAMIC_CODE, scaled by `nested` and moved by `offset`."""

    data: torch.Tensor  # uint8 (n/2,): two codes a byte, the first in the high half
    absmax: torch.Tensor  # (n/64,) fp32, or uint8 with double quantisation
    nested: torch.Tensor | None  # fp32 (n/64/256,), or finer: see nested_block
    offset: torch.Tensor | None  # fp32 scalar: the mean absmax
    shape: tuple[int, ...]

    @property
    def nested_block(self) -> int:
        """How many absmax share a value of `nested`: 256, or as few as rows in another order need (weights/bitsandbytes.py)."""
        usual = -(-self.absmax.numel() // NESTED_BLOCK) == self.nested.numel()
        return NESTED_BLOCK if usual else self.absmax.numel() // self.nested.numel()

    def scales(self) -> torch.Tensor:
        """absmax of every block, fp32."""
        if self.nested is None:
            return self.absmax
        return dequantize_blockwise(self.absmax, self.nested, DYNAMIC_CODE, self.nested_block) + self.offset


def quantize_nf4(weight: torch.Tensor, double_quant: bool = True, among=None) -> PackedNF4:
    """fp32, bf16 or fp16 of any shape -> PackedNF4, in bitsandbytes' bytes. Raises QuantError for NaN, infinity, no numbers.

    among (rank, processes, add): processes that hold the same weight share out the work: each packs every so many-th piece, and
    add(tensor) sums over all of them what is 0 but in one's own pieces. All get the whole."""
    rank, processes, add = among or (0, 1, lambda tensor: None)
    if not weight.is_floating_point() or not weight.numel():
        raise QuantError(f"cannot be quantised: {weight.numel()} numbers of {weight.dtype}")
    flat, piece = weight.flatten(), 2**20 if processes == 1 else 2**17
    data = flat.new_zeros(-(-flat.numel() // 2), dtype=torch.uint8)
    absmax = flat.new_zeros(-(-flat.numel() // BLOCK), dtype=torch.float32)
    for start in range(rank * piece, flat.numel(), processes * piece):  # the temporaries are a piece each, not a weight
        codes, scales = quantize_blockwise(flat[start : start + piece], NF4_CODE, BLOCK)
        codes = F.pad(codes, (0, len(codes) % 2), value=7)  # the code of 0
        data[start // 2 : (start + piece) // 2] = (codes[::2] << 4) | codes[1::2]
        absmax[start // BLOCK : (start + piece) // BLOCK] = scales
    add(data), add(absmax)
    if not absmax.isfinite().all():
        raise QuantError("holds NaN or infinity and cannot be quantised")
    if not double_quant:
        return PackedNF4(data, absmax, None, None, tuple(weight.shape))
    offset = absmax.mean()
    indices, nested = quantize_blockwise(absmax - offset, DYNAMIC_CODE, NESTED_BLOCK)
    return PackedNF4(data, indices, nested, offset, tuple(weight.shape))


def dequantize_nf4(packed: PackedNF4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """level[code] x absmax in fp32, rounded once to dtype. The weight's own shape."""
    return dequantize_op(*packed, dtype)


def dequantize_plain(packed: PackedNF4, dtype: torch.dtype) -> torch.Tensor:
    """What dequantize_nf4 computes, in plain PyTorch."""
    n, scales, data = math.prod(packed.shape), packed.scales()[:, None], packed.data
    out = torch.empty(scales.numel() * BLOCK, dtype=dtype, device=data.device)
    pairs = on_device(_PAIRS, data.device)
    if n % BLOCK:
        data = F.pad(data, (0, scales.numel() * BLOCK // 2 - data.numel()))  # up to a whole block; cut off below
    piece = min(data.numel(), 2**18)  # bytes at a time, so that what is between stays in the cache
    index, levels = data.new_empty(piece, dtype=torch.int32), pairs.new_empty(piece)
    for codes, scale, target in zip(data.split(piece), scales.split(piece // 32), out.split(2 * piece), strict=True):
        of = slice(len(codes))  # the last piece is shorter
        torch.index_select(pairs, 0, index[of].copy_(codes), out=levels[of])
        target.view(-1, BLOCK).copy_(levels[of].view(torch.float32).view(-1, BLOCK).mul_(scale))
    return out[:n].view(packed.shape)


def linear_plain(x: torch.Tensor, packed: PackedNF4) -> torch.Tensor:
    """F.linear(x, dequantised), some rows of W at a time, used before they leave the cache. A row is whole blocks."""
    n, k = packed.shape
    rows = max(1, 2**19 // k)
    data, scales = packed.data.view(n, -1).split(rows), packed.scales().view(n, -1).split(rows)
    pieces = (PackedNF4(d.flatten(), s.flatten(), None, None, (len(d), k)) for d, s in zip(data, scales, strict=True))
    return torch.cat([F.linear(x, dequantize_plain(piece, x.dtype)) for piece in pieces], dim=-1)


# PyTorch sees each of the two products of NF4 as one operator of known output: torch.compile and memory.py need not look inside.
_PACKED = "Tensor data, Tensor absmax, Tensor? nested, Tensor? offset, SymInt[] shape"


@torch.library.custom_op("nanotune::dequantize_nf4", mutates_args=(), schema=f"({_PACKED}, ScalarType dtype) -> Tensor")
def dequantize_op(data, absmax, nested, offset, shape, dtype):
    packed = PackedNF4(data, absmax, nested, offset, tuple(shape))
    kernel = triton and data.is_cuda and math.prod(shape) % BLOCK == 0
    return dequantize_triton(packed, dtype) if kernel else dequantize_plain(packed, dtype)


@torch.library.custom_op("nanotune::nf4_linear", mutates_args=(), schema=f"(Tensor x, {_PACKED}) -> Tensor")
def nf4_linear_op(x, data, absmax, nested, offset, shape):
    """x (T, in) @ W^T -> (T, out), W never in memory: 4.13 bits a weight are read; making W would write and read 32 more."""
    packed = PackedNF4(data, absmax, nested, offset, tuple(shape))
    return matvec_triton(x, packed) if triton and x.is_cuda and shape[1] % 256 == 0 else linear_plain(x, packed)


dequantize_op.register_fake(lambda data, absmax, nested, offset, shape, dtype: data.new_empty(shape, dtype=dtype))
nf4_linear_op.register_fake(lambda x, data, absmax, nested, offset, shape: x.new_empty(*x.shape[:-1], shape[0]))


def _kernel_arguments(packed: PackedNF4) -> tuple:
    """(absmax, nested, offset, levels, dynamic levels), NESTED: what both kernels take alike."""
    tables = [on_device(code, packed.data.device) for code in (NF4_CODE, DYNAMIC_CODE)]
    if packed.nested is None:  # the kernel looks at neither
        return (packed.absmax, packed.absmax, packed.absmax, *tables), 0
    return (packed.absmax, packed.nested, packed.offset, *tables), packed.nested_block


def dequantize_triton(packed: PackedNF4, dtype: torch.dtype) -> torch.Tensor:
    """dequantize_plain as one kernel, equal to the bit. The weight is whole blocks of 64."""
    out = torch.empty(packed.shape, dtype=dtype, device=packed.data.device)
    blocks, (arguments, nested) = packed.absmax.numel(), _kernel_arguments(packed)
    # Without fusion into multiply-add, which rounds once where the plain lines round twice.
    with torch.cuda.device_of(out):  # Triton launches on the current GPU, wherever the tensors are
        dequantize_kernel[(triton.cdiv(blocks, 32),)](packed.data, *arguments, out, blocks, nested, B=32, enable_fp_fusion=False)
    return out


def matvec_triton(x: torch.Tensor, packed: PackedNF4) -> torch.Tensor:
    """F.linear(x, dequantised), 1 to 16 rows, K a multiple of 256, but for the order of sums; for one row W is not rounded."""
    (n, k), rows, (arguments, nested) = packed.shape, x.flatten(0, -2).contiguous(), _kernel_arguments(packed)
    out = x.new_empty(len(rows), n)
    with torch.cuda.device_of(out):
        if len(rows) == 1:
            arguments = (rows, packed.data.view(torch.int32), *arguments, out, n, k, nested)
            matvec_kernel[(triton.cdiv(n, 8),)](*arguments, BN=8, WORDS=32, num_warps=2, enable_fp_fusion=True)
        else:
            arguments = (rows, packed.data, *arguments, out, len(rows), n, k, nested)
            tile = 16 if x.dtype == torch.float32 else 32  # what a T4's 64 KB of shared memory have room for
            few_rows_kernel[(triton.cdiv(n, tile),)](*arguments, "ieee", tile, BYTES=128, num_stages=2, enable_fp_fusion=True)
    return out.view(*x.shape[:-1], n)


class _FrozenLinear(torch.autograd.Function):
    """x @ W^T with W made from its packed form in forward, forgotten, and made again in backward. W gets no gradient."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        return F.linear(x, module.dequantize(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.module.dequantize(grad.dtype), None


class FrozenLinear(nn.Module):
    """A linear without bias whose weight is packed and never trained; how, is the business of NF4Linear and Int8Linear."""

    def __init__(self, weight):
        super().__init__()
        self.out_features, self.in_features = weight.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _FrozenLinear.apply(x, self)

    def dequantized(self) -> nn.Linear:
        """A plain bf16 linear with the same weight: what an adapter is merged into."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dequantize(torch.bfloat16), requires_grad=False)
        return linear


class NF4Linear(FrozenLinear):
    """weight (out, in), or one packed already -> NF4 with double quantisation: 4.127 bits a weight.

    All is kept as plain frozen uint8 parameters (the fp32 of `nested` and the offset as their bytes), so that nothing that
    casts a model, or shards it, can change a scale."""

    among = None  # the processes that pack a weight together, see quantize_nf4

    def __init__(self, weight: torch.Tensor | PackedNF4):
        super().__init__(weight)
        packed = weight if isinstance(weight, PackedNF4) else quantize_nf4(weight, among=self.among)
        self.weight = nn.Parameter(packed.data, requires_grad=False)
        self.absmax = nn.Parameter(packed.absmax, requires_grad=False)
        nested = torch.cat([packed.nested, packed.offset.view(1)]).view(torch.uint8)
        self.nested = nn.Parameter(nested, requires_grad=False)

    def packed(self) -> PackedNF4:
        nested = self.nested.data.view(torch.float32)
        return PackedNF4(self.weight.data, self.absmax.data, nested[:-1], nested[-1], (self.out_features, self.in_features))

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return dequantize_nf4(self.packed(), dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or x.numel() > 16 * self.in_features or self.in_features % BLOCK:
            return super().forward(x)
        return nf4_linear_op(x, *self.packed())  # decoding: a token or a few


class Int8Linear(FrozenLinear):
    """weight (out, in) -> int8 with one scale a row: w = q x absmax / 127 ("LLM.int8()", sections 2.1 and 3.1; x is not
    quantised). 8 bits a weight."""

    def __init__(self, weight: torch.Tensor):
        super().__init__(weight)
        values = weight.new_empty(weight.shape, dtype=torch.int8)
        scale = weight.new_empty(len(weight), 1, dtype=torch.float32)
        rows = max(1, 2**19 // self.in_features)  # at a time: the temporaries are a piece each, which stays in the cache
        for piece, factor, out in zip(weight.split(rows), scale.split(rows), values.split(rows), strict=True):
            piece = piece.float()
            torch.div(piece.abs().amax(dim=1, keepdim=True).clamp(min=1e-38), 127, out=factor)
            out.copy_((piece / factor).round_())
        if not scale.isfinite().all():
            raise QuantError("holds NaN or infinity and cannot be quantised")
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(scale.view(torch.uint8), requires_grad=False)  # fp32 as bytes, as in NF4Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        few = x.numel() <= 16 * self.in_features
        # PyTorch's product reads past the end of rows that are not whole vectors; fp16 may not hold sums of 127 times x.
        unfit = self.in_features % 32 if few else x.dtype == torch.float16
        if unfit or torch.is_grad_enabled() or x.device.type != "cpu":
            return super().forward(x)
        weight, scale = self.weight.data, self.scale.data.view(torch.float32).flatten()
        if few:  # decoding: each weight is read once, in 8 bits
            return torch._weight_int8pack_mm(x.flatten(0, -2), weight, scale.to(x.dtype)).view(*x.shape[:-1], -1)
        parts = weight.split(max(1, 2**21 // self.in_features))  # a prompt: some rows at a time are cast, and stay in the cache
        return (torch.cat([F.linear(x, q.to(x.dtype)) for q in parts], dim=-1) * scale).to(x.dtype)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        # Multiplied in fp32 and rounded once, straight into its place: no fp32 weight is made first. On a CPU some rows at a
        # time, which stay in its cache: ten times as fast. (A fake tensor has no numbers to keep there.)
        out, scale = torch.empty_like(self.weight, dtype=dtype), self.scale.data.view(torch.float32)
        rows = max(1, 2**19 // self.in_features) if type(out) is torch.Tensor and not out.is_cuda else len(out)
        for place, weight, factor in zip(out.split(rows), self.weight.data.split(rows), scale.split(rows), strict=True):
            torch.mul(weight, factor, out=place)
        return out


QUANTIZERS = {"none": None, "int8": Int8Linear, "nf4": NF4Linear}


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with both moments in 8 bits: 2 bytes a weight instead of 8 ("8-bit Optimizers via Block-wise
    Quantization", section 2).

    For each weight the moments are made fp32, used for an ordinary AdamW step, and packed again in blocks of 256. Tensors of
    fewer than 4,096 numbers keep fp32 moments, which cost nothing there. bf16 weights are rounded
    stochastically: an update below half of their last bit is not lost but applied with the probability it deserves, by numbers
    drawn from the step and the weight's place alone: the same wherever copies of a weight must stay equal (DDP).
    Of a weight in shards (FSDP) each process steps its own, in blocks of its own: other blocks than the whole weight's."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (beta1, beta2), rate = group["betas"], group["lr"]
            for place, weight in enumerate(group["params"]):
                if weight.grad is None:
                    continue
                shard, grad = (x.to_local() if hasattr(x, "to_local") else x for x in (weight, weight.grad))
                state = self.state[weight] = self.state[weight] or self._beginning(shard)
                state["step"] += 1
                step, keep = int(state["step"]), 1 - rate * group["weight_decay"]
                # Both moments begin at 0, and so are too small at first: the mean's correction is put into the rate.
                numbers = [keep, beta1, beta2, rate / (1 - beta1**step), 1 - beta2**step, group["eps"]]
                seed = step * len(group["params"]) + place
                adamw_op(shard.view(-1), grad.reshape(-1), *(state.get(name) for name in MOMENTS), numbers, seed)

    @staticmethod
    def _beginning(weight: torch.Tensor) -> dict:
        state, n = {"step": torch.tensor(0)}, weight.numel()
        for name in MOMENTS[:2]:
            state[name] = torch.zeros(n, dtype=torch.uint8 if n >= 4096 else torch.float32, device=weight.device)
            if n >= 4096:
                state[f"{name}_absmax"] = torch.zeros(-(-n // NESTED_BLOCK), device=weight.device)
        return state


MOMENTS = ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")


@torch.library.custom_op("nanotune::adamw_8bit", mutates_args={"weight", "mean", "square", "mean_absmax", "square_absmax"})
def adamw_op(
    weight: torch.Tensor, grad: torch.Tensor, mean: torch.Tensor, square: torch.Tensor,
    mean_absmax: torch.Tensor | None, square_absmax: torch.Tensor | None, numbers: list[float], seed: int,
) -> None:  # fmt: skip
    """One step of a flat weight and its moments, all changed in place."""
    if triton and weight.is_cuda and mean_absmax is not None:
        return adamw_triton(weight, grad, mean, square, mean_absmax, square_absmax, numbers, seed)
    random = torch.Generator(weight.device).manual_seed(seed)
    size = 2**24 if weight.is_cuda else 2**16  # a piece at a time: what is fp32 for a moment stays small, on a CPU in its cache
    moments = (mean, square) if mean_absmax is None else (mean, square, mean_absmax, square_absmax)
    cut = [x.split(size if len(x) == len(weight) else size // NESTED_BLOCK) for x in (weight, grad, *moments)]
    for piece in zip(*cut, strict=True):
        adamw_plain(*piece, numbers=numbers, random=random)


adamw_op.register_fake(lambda *of: None)


def adamw_plain(weight, grad, mean, square, *absmax, numbers: list[float], random: torch.Generator) -> None:
    """What adamw_op does to a piece of a weight, in plain PyTorch."""
    (keep, beta1, beta2, rate, correction, eps), grad = numbers, grad.float()
    m, v = mean, square
    if absmax:
        m = dequantize_blockwise(mean, absmax[0], DYNAMIC_CODE, NESTED_BLOCK)
        v = dequantize_blockwise(square, absmax[1], UNSIGNED_CODE, NESTED_BLOCK)
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    exact = (weight.float() * keep).addcdiv_(m, (v / correction).sqrt_().add_(eps), value=-rate)
    weight.copy_(stochastic_round(exact, random) if weight.dtype == torch.bfloat16 else exact)
    if absmax:
        codes, scales = quantize_blockwise(m, DYNAMIC_CODE, NESTED_BLOCK)
        mean.copy_(codes), absmax[0].copy_(scales)
        codes, scales = quantize_blockwise(v, UNSIGNED_CODE, NESTED_BLOCK)
        # A mean square that is not 0 must not become 0: the next step divides by its root.
        square.copy_(torch.where(v > 0, codes.clamp(min=1), codes)), absmax[1].copy_(scales)


def stochastic_round(x: torch.Tensor, random: torch.Generator | None = None) -> torch.Tensor:
    """fp32 -> bf16, up or down with the odds of the distance, so that the expectation is x.

    bf16 is the upper half of fp32's bits: add a random number below one unit of that half, cut the lower half off."""
    noise = torch.randint(2**16, x.shape, dtype=torch.int32, device=x.device, generator=random)
    return ((x.view(torch.int32) + noise) & -(2**16)).view(torch.float32).bfloat16()


def adamw_triton(weight, grad, mean, square, mean_absmax, square_absmax, numbers: list[float], seed: int) -> None:
    """adamw_plain for a whole weight in one kernel; its random numbers are others."""
    books = (DYNAMIC_CODE, _MIDDLES[DYNAMIC_CODE], UNSIGNED_CODE, _MIDDLES[UNSIGNED_CODE])
    with torch.cuda.device_of(weight):
        adamw_kernel[(triton.cdiv(len(mean_absmax), 4),)](
            weight, grad, mean, square, mean_absmax, square_absmax, *(on_device(book, weight.device) for book in books),
            len(weight), *numbers, seed, ROUND=weight.dtype == torch.bfloat16, B=4,
        )  # fmt: skip
