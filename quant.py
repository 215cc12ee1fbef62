"""Quantisation: frozen weights in 4 or 8 bits, and an AdamW whose moments take 8 ("QLoRA", Dettmers et al. 2023, section 3).

A pretrained weight matrix, cut into blocks of 64, is nearly normal in each. NF4 therefore keeps, per block, the largest absolute
value, and per weight one of 16 levels, spaced as the quantiles of a normal distribution are: dense near 0, sparse at the ends.

    absmax = max |w|  over the block        code = nearest level to w / absmax        w' = level[code] x absmax

4 bits a weight and 32 / 64 for absmax make 4.5. Double quantisation stores the absmax themselves in 8 bits (blocks of 256, their
mean taken off first) and leaves 4 + 8/64 + 32/(64 x 256) = 4.127 bits: the linears of 7B's blocks take 3.3 GB instead of 13.0.
The mean squared error on normal data is 0.0085 of the variance.

Such weights are not trained: for every product they are turned back into 16 bits, used, and forgotten, in forward and again
in backward. That is a few more milliseconds a layer, and it is why a QLoRA step needs less memory than a LoRA step but more time.

The bytes are those of bitsandbytes. (Its compiled CPU path rounds about 0.2 % of the double-quantised scales to the neighbouring
level; these lines take the nearest.) All is plain PyTorch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

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

    Seven decades from 1e-7 to 1; each larger decade has twice the levels of the one below, at the middles of equal parts of
    its upper nine tenths. So small values keep their size to within a decade's step, and large ones keep three digits."""
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


def quantize_blockwise(x: torch.Tensor, code: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest level for each value of x (any shape, read flat, fp32): uint8 indices (n,) and absmax fp32 (blocks,).

    Every block of `block` values is divided by its own absmax first; the last may be shorter. Ties go to the lower level."""
    flat = x.flatten().float()
    middles = ((code[:-1] + code[1:]) / 2).to(x.device)
    whole = flat.numel() // block * block
    indices, scales = [], []
    for part, width in ((flat[:whole], block), (flat[whole:], flat.numel() - whole)):
        if part.numel():
            rows = part.view(-1, width)
            absmax = rows.abs().amax(dim=1)
            divisor = absmax.clamp(min=1e-38)[:, None]
            scaled = rows * (1 / divisor) if width == block else rows / divisor  # as bitsandbytes does, to the last bit
            indices.append(torch.bucketize(scaled.clamp(-1, 1), middles, out_int32=True).to(torch.uint8).flatten())
            scales.append(absmax)
    return torch.cat(indices), torch.cat(scales)


def dequantize_blockwise(indices: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, block: int) -> torch.Tensor:
    """The inverse: fp32 (n,)."""
    scale = absmax.repeat_interleave(block)[: indices.numel()]
    return code.to(indices.device)[indices.int()] * scale


# ---------------------------------------------------------------------------------------------------------------------
# NF4


@dataclass
class PackedNF4:
    """A weight in NF4. Double quantisation makes absmax indices into DYNAMIC_CODE, scaled by `nested` and moved by `offset`."""

    data: torch.Tensor  # uint8 (n/2,): two codes a byte, the first in the high half
    absmax: torch.Tensor  # (n/64,) fp32, or uint8 with double quantisation
    nested: torch.Tensor | None  # fp32 (n/64/256,)
    offset: torch.Tensor | None  # fp32 scalar: the mean absmax
    shape: tuple[int, ...]

    def scales(self) -> torch.Tensor:
        """absmax of every block, fp32."""
        if self.nested is None:
            return self.absmax
        return dequantize_blockwise(self.absmax, self.nested, DYNAMIC_CODE, NESTED_BLOCK) + self.offset


def quantize_nf4(weight: torch.Tensor, double_quant: bool = True) -> PackedNF4:
    """fp32, bf16 or fp16 of any shape -> PackedNF4, in bitsandbytes' bytes. Raises QuantError for NaN, infinity, no numbers."""
    if not weight.is_floating_point() or not weight.numel():
        raise QuantError(f"cannot be quantised: {weight.numel()} numbers of {weight.dtype}")
    if not weight.isfinite().all():
        raise QuantError("holds NaN or infinity and cannot be quantised")
    flat, codes, scales = weight.flatten(), [], []
    for start in range(0, flat.numel(), 2**22):  # a piece at a time: the temporaries are 16 MB, not three times the weight
        c, s = quantize_blockwise(flat[start : start + 2**22], NF4_CODE, BLOCK)
        codes.append(c)
        scales.append(s)
    codes, absmax = torch.cat(codes), torch.cat(scales)
    if codes.numel() % 2:
        codes = F.pad(codes, (0, 1), value=7)  # the code of 0
    data = (codes[::2] << 4) | codes[1::2]
    if not double_quant:
        return PackedNF4(data, absmax, None, None, tuple(weight.shape))
    offset = absmax.mean()
    indices, nested = quantize_blockwise(absmax - offset, DYNAMIC_CODE, NESTED_BLOCK)
    return PackedNF4(data, indices, nested, offset, tuple(weight.shape))


def dequantize_nf4(packed: PackedNF4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """level[code] x absmax in fp32, rounded once to dtype. The weight's own shape."""
    return _dequantize_nf4(packed.data, packed.absmax, packed.nested, packed.offset, packed.shape, dtype)


@torch.library.custom_op("nanotune::dequantize_nf4", mutates_args=())
def _dequantize_nf4(
    data: torch.Tensor,
    absmax: torch.Tensor,
    nested: torch.Tensor | None,
    offset: torch.Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    packed = PackedNF4(data, absmax, nested, offset, shape)
    n, scales = math.prod(packed.shape), packed.scales()[:, None]
    out = torch.empty(scales.numel() * BLOCK, dtype=dtype, device=packed.data.device)
    pairs = _PAIRS.to(packed.data.device)
    data = F.pad(packed.data, (0, scales.numel() * BLOCK // 2 - packed.data.numel()))  # up to a whole block; cut off below
    for start in range(0, data.numel(), 2**18):  # pieces that stay in the cache
        piece = slice(start, start + 2**18)
        levels = pairs.index_select(0, data[piece].int()).view(torch.float32).view(-1, BLOCK)
        torch.mul(levels, scales[start // 32 : (start + 2**18) // 32], out=out[2 * start : 2 * (start + 2**18)].view(-1, BLOCK))
    return out[:n].view(packed.shape)


@_dequantize_nf4.register_fake
def _(data, absmax, nested, offset, shape, dtype):
    return torch.empty(shape, dtype=dtype, device=data.device)


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

    def __init__(self, weight: torch.Tensor):
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
    """weight (out, in) -> NF4 with double quantisation: 4.127 bits a weight.

    All is kept as plain frozen uint8 parameters (the fp32 of `nested` and the offset as their bytes), so that nothing that
    casts a model, or shards it, can change a scale."""

    def __init__(self, weight: torch.Tensor):
        super().__init__(weight)
        packed = quantize_nf4(weight)
        self.weight = nn.Parameter(packed.data, requires_grad=False)
        self.absmax = nn.Parameter(packed.absmax, requires_grad=False)
        nested = torch.cat([packed.nested, packed.offset.view(1)])
        self.nested = nn.Parameter(nested.view(torch.uint8), requires_grad=False)

    def packed(self) -> PackedNF4:
        nested = self.nested.data.view(torch.float32)
        return PackedNF4(self.weight.data, self.absmax.data, nested[:-1], nested[-1], (self.out_features, self.in_features))

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return dequantize_nf4(self.packed(), dtype)


class Int8Linear(FrozenLinear):
    """weight (out, in) -> int8 with one scale a row: w = q x absmax / 127 ("LLM.int8()", section 2.1). 8 bits a weight."""

    def __init__(self, weight: torch.Tensor):
        super().__init__(weight)
        if not weight.isfinite().all():
            raise QuantError("holds NaN or infinity and cannot be quantised")
        scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-38) / 127
        self.weight = nn.Parameter((weight.float() / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale.view(torch.uint8), requires_grad=False)  # fp32 as bytes, as in NF4Linear

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.weight.data * self.scale.data.view(torch.float32)).to(dtype)


QUANTIZERS = {"none": None, "int8": Int8Linear, "nf4": NF4Linear}


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with both moments in 8 bits: 2 bytes a weight instead of 8 ("8-bit Optimizers via Block-wise
    Quantization", section 2).

    For each weight the moments are made fp32, used for an ordinary AdamW step, and packed again in blocks of 256. Tensors of
    fewer than 4,096 numbers keep fp32 moments: they cost nothing, and norms are sensitive. bf16 weights are rounded
    stochastically: an update below half of their last bit is not lost but applied with the probability it deserves."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                state["step"] = state.get("step", 0) + 1
                grad = weight.grad.float()
                mean = self._unpacked(state, "exp_avg", weight, DYNAMIC_CODE).lerp_(grad, 1 - beta1)
                square = (
                    self._unpacked(state, "exp_avg_sq", weight, UNSIGNED_CODE).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                )
                exact = weight.float() * (1 - group["lr"] * group["weight_decay"])
                root = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
                exact.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1 ** state["step"]))
                weight.copy_(stochastic_round(exact) if weight.dtype == torch.bfloat16 else exact)
                self._pack(state, "exp_avg", mean, DYNAMIC_CODE)
                self._pack(state, "exp_avg_sq", square, UNSIGNED_CODE)

    @staticmethod
    def _unpacked(state: dict, name: str, weight: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        if name not in state:
            return torch.zeros_like(weight, dtype=torch.float32)
        if f"{name}_absmax" not in state:
            return state[name]
        return dequantize_blockwise(state[name], state[f"{name}_absmax"], code, NESTED_BLOCK).view(weight.shape)

    @staticmethod
    def _pack(state: dict, name: str, moment: torch.Tensor, code: torch.Tensor) -> None:
        if moment.numel() < 4096:
            state[name] = moment
            return
        indices, state[f"{name}_absmax"] = quantize_blockwise(moment, code, NESTED_BLOCK)
        if code is UNSIGNED_CODE:  # a mean square that is not 0 must not become 0: the next step divides by its root
            indices = torch.where(moment.flatten() > 0, indices.clamp(min=1), indices)
        state[name] = indices

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        # PyTorch has cast every moment to the format of its weight. Bytes are to stay bytes: put them back as they were saved.
        weights = [weight for group in self.param_groups for weight in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for weight, number in zip(weights, numbers, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[weight][name] = value.to(weight.device, copy=True) if torch.is_tensor(value) else value


def stochastic_round(x: torch.Tensor) -> torch.Tensor:
    """fp32 -> bf16, up or down with the odds of the distance, so that the expectation is x.

    bf16 is the upper half of fp32's bits: add a random number below one unit of that half, cut the lower half off."""
    noise = torch.randint_like(x, 2**16, dtype=torch.int32)
    return ((x.view(torch.int32) + noise) & -(2**16)).view(torch.float32).bfloat16()
