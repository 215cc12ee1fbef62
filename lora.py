"""LoRA: fine-tune by adding a small correction to frozen weights ("LoRA", Hu et al. 2021, section 4.1).

Full fine-tuning learns a whole new matrix W + dW. LoRA freezes W and learns dW as a product of two thin matrices:

    y = W x + (alpha / r) B A x        A (r, in) random, B (out, r) zero, so training starts at exactly W

For one 4096 x 4096 matrix of Llama 2 7B and rank 8 that is 2 x 8 x 4096 = 65,536 trained numbers instead of 16.8 million.
What it saves is memory: gradients and AdamW's two moments (12 bytes a trained weight in fp32, 81 GB for 7B) shrink to almost
nothing. What it costs: the two thin products, about 2 x r x (in + out) FLOPs a token and matrix. The frozen W still takes part
in every forward and backward pass; only its gradient is never made.

`add_lora` swaps every chosen linear by a LoRALinear holding it; the model's own code does not change. `merge_lora` adds
(alpha / r) B A into W and puts plain linears back. On disk an adapter is PEFT's (weights/peft.py).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class LoRAError(ValueError):
    """An adapter that cannot be added to, or read for, this model."""


class LoRALinear(nn.Module):
    """A frozen linear (anything with in_features and out_features) and its low-rank correction.

    A and B are fp32 whatever the base's format: an update of 1e-4 to a weight near 1 is lost in bf16's 8 bits.
    They are cast to x's format for the product. A is drawn on the CPU, whose numbers are the same beside every device."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float, rslora: bool, device=None):
        super().__init__()
        if rank > max(base.in_features, base.out_features):
            raise LoRAError(f"a rank of {rank} is more than any {base.out_features} x {base.in_features} matrix has")
        self.base = base
        self.scaling = scaling(rank, alpha, rslora)
        self.dropout = nn.Dropout(dropout)
        drawn = torch.empty(rank, base.in_features, dtype=torch.float32)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))  # evenly from -1 / sqrt(in) to 1 / sqrt(in), as in PEFT
        self.lora_A = nn.Parameter(drawn.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        thin = F.linear(self.dropout(x), self.lora_A.to(x.dtype)) * self.scaling  # (T, r): the cheap place to scale
        return self.base(x).addmm_(thin, self.lora_B.to(x.dtype).T)  # added within the product: (T, out) is written once


class LoRAEmbedding(nn.Module):
    """The same for the embedding, where A's product with a one-hot token is a look-up. As in PEFT, A is zero and B random."""

    def __init__(self, base: nn.Embedding, rank: int, alpha: float, dropout: float, rslora: bool, device=None):
        super().__init__()
        self.base = base  # dropout is not applied: a token is there or it is not
        self.scaling = scaling(rank, alpha, rslora)
        self.lora_A = nn.Parameter(torch.zeros(rank, base.num_embeddings, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.randn(base.embedding_dim, rank, dtype=torch.float32).to(device))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.base(tokens)  # (T, C)
        thin = F.embedding(tokens, self.lora_A.T.to(x.dtype))  # (T, r)
        return x + F.linear(thin, self.lora_B.to(x.dtype)) * self.scaling


def scaling(rank: int, alpha: float, rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) which keeps large ranks learning ("rsLoRA", Kalajdzievski 2023)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def add_lora(
    model: nn.Module, rank: int = 8, alpha: float = 16, dropout: float = 0.0, targets=("all-linear",), rslora=False, part=None
):
    """Freeze the model and wrap every module whose own name is in `targets`, in place. Returns the model.

    targets: names such as "wq" or "output"; "all-linear" is every linear of the blocks (QLoRA, section 4, found that all of
    them are needed to match full fine-tuning). part: only what is in this block ("layers.3"), or in no block ("").
    Raises LoRAError for a name that the model does not have, listing those it has."""
    if rank < 1:
        raise LoRAError(f"LoRA's rank must be at least 1, not {rank}")
    fits = [path for path, module in model.named_modules() if hasattr(module, "in_features") or isinstance(module, nn.Embedding)]
    wrapped = [path for path, module in model.named_modules() if isinstance(module, LoRALinear | LoRAEmbedding)]
    known = {path.rsplit(".", 1)[-1] for path in [*fits, *wrapped]} - {"base"}  # what is in a wrapped one, of an earlier part
    unknown = set(targets) - known - {"all-linear"}
    if unknown or not targets:
        asked = ", ".join(sorted(unknown)) or "(none)"
        raise LoRAError(f"unknown LoRA target {asked}: known are all-linear, {', '.join(sorted(known))}")

    def inside(path):
        return part is None or (path.startswith(f"{part}.") if part else not path.startswith("layers."))

    for path, weight in model.named_parameters():
        if inside(path):
            weight.requires_grad_(False)
    for path in filter(inside, fits):
        if path.rsplit(".", 1)[-1] in targets or ("all-linear" in targets and path.startswith("layers.")):
            wrap(model, path, rank, alpha, dropout, rslora)
    return model


def wrap(model: nn.Module, path: str, *options) -> nn.Module:
    """Put an adapter around one linear or embedding. options: those of LoRALinear behind `base`."""
    base = model.get_submodule(path)
    kind = LoRAEmbedding if isinstance(base, nn.Embedding) else LoRALinear
    wrapped = kind(base, *options, device=next(base.parameters()).device)
    model.set_submodule(path, wrapped)
    return wrapped


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's tensors by name: `layers.0.attention.wq.lora_A` and so on."""
    return {name: p for name, p in model.named_parameters() if name.endswith((".lora_A", ".lora_B"))}


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Add every correction into its frozen weight and put the plain modules back, in place. Returns the model.

    The sum is taken in fp32 and rounded once to the weight's format. Called once, when training is over; never by eval():
    merging and unmerging in bf16 a hundred times changes a tenth of the weights."""
    for path, module in list(model.named_modules()):
        if isinstance(module, LoRALinear | LoRAEmbedding):
            delta = module.lora_B @ module.lora_A  # (out, in), or (C, V) for the embedding
            if isinstance(module, LoRAEmbedding):
                delta = delta.T
            # A quantised weight (quant.py) is turned back first: the sum is kept in bf16, not rounded to 4 bits again.
            base = module.base.dequantized() if hasattr(module.base, "dequantized") else module.base
            base.weight.copy_(base.weight.float() + module.scaling * delta)
            model.set_submodule(path, base)
    for path, module in list(model.named_modules()):
        if hasattr(module, "dequantized"):  # quantised, without an adapter
            model.set_submodule(path, module.dequantized())
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Adapters on disk. Last, as what is there needs what stands above.

from weights.peft import load_adapter, read_adapter, save_adapter  # noqa: E402, F401
