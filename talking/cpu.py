"""A model as a CPU answers faster with, and no longer one to train or to save.

A CPU makes a token as fast as it reads every weight once, so the order in which they lie in memory decides. Beside that a
block has dozens of small operations, which take longer to begin than to do: the fewer the better.
"""

import logging
import math
from contextlib import suppress
from functools import cache

import torch
from torch import nn

from model import ModelConfig, RMSNorm
from quant import BLOCK, NF4_CODE, FrozenLinear, NF4Linear


class CPULinear(FrozenLinear):
    """weight (out, in) in bf16, not quantised, laid out as oneDNN's product on a CPU reads it: pairs of rows interleaved.

    From plain rows every product makes that order anew, piece by piece. A product of one token then reads weights at 65 to
    80 % of the speed that this order, made once, gives."""

    def __init__(self, weight: torch.Tensor):
        super().__init__(weight)
        ordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(torch.bfloat16), 1)
        self.weight = nn.Parameter(ordered, requires_grad=False)

    @staticmethod
    def helps(device: torch.device, dtype: torch.dtype) -> bool:
        """Whether it is for weights of this kind, on a CPU as this is."""
        here = torch.backends.mkldnn.is_available()  # not in PyTorch for a Mac, whose torch.ops.mkldnn is empty
        return here and device.type == "cpu" and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight.data, None, "none", [], "")

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.data.to_dense().to(dtype)


@cache
def bitsandbytes():
    """The library, where it is installed and multiplies by NF4 on this CPU: with AVX-512's instructions for bf16. Else None."""
    with suppress(Exception):  # an extra that answers do without, whatever is wrong with how it is installed
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks of kernels that it does without
        import bitsandbytes as library

        if getattr(library.functional, "has_avx512bf16", bool)():  # versions before 0.49 have no such product
            return library
    return None


class CPUNF4(FrozenLinear):
    """A weight in NF4 whose product is bitsandbytes', an optional extra: the bytes are the same, so they are handed over.

    PyTorch has no product of NF4 for a CPU, and NF4Linear writes the weight out for every token, which takes ten times as long
    as bf16. Compiled, the weight's 4 bits become numbers in the processor's registers: a quarter of bf16's bytes are read.
    The linear that it is made from gives its memory to it, and is not to be used any more."""

    def __init__(self, linear: NF4Linear):
        packed, absmax = linear.packed(), []
        super().__init__(packed)
        data, scales = packed.data.view(self.out_features, -1), packed.scales().view(self.out_features, -1)
        rows = max(32, 2**20 // self.in_features // 32 * 32)  # some at a time, in the cache: what it makes on the way is large
        for codes, part in zip(data.split(rows), scales.split(rows), strict=True):
            self.product = self._ordered(codes, part)
            codes.copy_(self.product.weight.data)  # in place of those that were there
            absmax.append(self.scales())
        weight = self.product.weight
        weight.data, weight.quant_state.absmax, weight.quant_state.shape = data, torch.cat(absmax, dim=1), packed.shape

    def _ordered(self, codes: torch.Tensor, absmax: torch.Tensor) -> nn.Module:
        """The library's linear of some rows, put in the order that its product reads, which it does when it is first called."""
        library, shape = bitsandbytes(), (len(codes), self.in_features)
        how = {"bias": False, "compute_dtype": torch.bfloat16, "quant_type": "nf4", "device": "meta"}
        linear = library.nn.Linear4bit(*reversed(shape), **how).eval()
        state = library.functional.QuantState(absmax.flatten(), shape, NF4_CODE, BLOCK, "nf4", torch.bfloat16)
        linear.weight = library.nn.Params4bit(codes.reshape(-1, 1), requires_grad=False, quant_state=state, bnb_quantized=True)
        linear(torch.zeros(1, self.in_features, dtype=torch.bfloat16))
        return linear

    @staticmethod
    def helps(linear: NF4Linear, dtype: torch.dtype) -> bool:
        """Whether it is for this weight, to be multiplied with numbers of this dtype."""
        fits = linear.out_features % 32 == 0 and linear.in_features % BLOCK == 0
        return fits and linear.weight.device.type == "cpu" and dtype == torch.bfloat16 and bitsandbytes() is not None

    def scales(self) -> torch.Tensor:
        """Of each block of 64, in bf16: what is read for a token beside the codes."""
        return self.product.weight.quant_state.absmax

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x.contiguous())  # it takes the numbers of a row to lie side by side, whatever their stride


class CPUNorm(nn.Module):
    """RMSNorm in five operations instead of the ten that PyTorch's is on a CPU. With |x| the length of a row of D numbers

    x / sqrt(|x|^2 / D + eps) * weight = x / hypot(|x|, sqrt(D eps)) * (weight * sqrt(D))"""

    def __init__(self, norm: RMSNorm):
        super().__init__()
        self.weight, dim = norm.weight, len(norm.weight)
        self.register_buffer("scaled", norm.weight.detach().float() * math.sqrt(dim))
        self.register_buffer("least", torch.tensor(math.sqrt(dim * norm.eps)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return (x / torch.hypot(length, self.least)).mul_(self.scaled).to(x.dtype)


def outgrows_cache(config: ModelConfig) -> bool:
    """Whether the weights are too many for a CPU's cache. Then half their bytes take half the time; in it, fp32 is as fast."""
    return 12 * config.n_layers * config.dim**2 > 5e7


def order_for_cpu(model: nn.Module) -> nn.Module:
    """On a CPU, make every norm a CPUNorm, and where that helps every linear a CPULinear, or a CPUNF4 if it is in NF4. In place;
    returns the model."""
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and CPULinear.helps(module.weight.device, module.weight.dtype):
            model.set_submodule(path, CPULinear(module.weight))
        elif isinstance(module, NF4Linear) and CPUNF4.helps(module, dtype):
            model.set_submodule(path, CPUNF4(module))
        elif isinstance(module, RMSNorm) and module.weight.device.type == "cpu":
            model.set_submodule(path, CPUNorm(module))
    return model
