"""LoRA: fine-tune by adding a small correction to frozen weights ("LoRA", Hu et al. 2021, section 4.1).

Full fine-tuning learns a whole new matrix W + dW. LoRA freezes W and learns dW as a product of two thin matrices:

    y = W x + (alpha / r) B A x        A (r, in) random, B (out, r) zero, so training starts at exactly W

For one 4096 x 4096 matrix of Llama 2 7B and rank 8 that is 2 x 8 x 4096 = 65,536 trained numbers instead of 16.8 million.
What it saves is memory: gradients and AdamW's two moments (12 bytes a trained weight in fp32, 81 GB for 7B) shrink to almost
nothing. What it costs: the two thin products, about 2 x r x (in + out) FLOPs a token and layer. The frozen W still takes part
in every forward and backward pass; only its gradient is never made.

`add_lora` swaps every chosen linear by a LoRALinear holding it; the model's own code does not change. `merge_lora` adds
B A into W and puts plain linears back. On disk an adapter is PEFT's: adapter_config.json and adapter_model.safetensors.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from helping.files import readable


class LoRAError(ValueError):
    """An adapter that cannot be added to, or read for, this model."""


class LoRALinear(nn.Module):
    """A frozen linear (anything with in_features and out_features) and its low-rank correction.

    A and B are fp32 whatever the base's format: an update of 1e-4 to a weight near 1 is lost in bf16's 8 bits.
    They are cast to x's format for the product."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float, rslora: bool, device=None):
        super().__init__()
        self.base = base
        self.scaling = scaling(rank, alpha, rslora)
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

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
        self.lora_B = nn.Parameter(torch.randn(base.embedding_dim, rank, dtype=torch.float32, device=device))

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
    wrapped = [path for path, module in model.named_modules() if isinstance(module, LoRALinear | LoRAEmbedding)]  # other parts
    known = {path.rsplit(".", 1)[-1] for path in [*fits, *wrapped]} - {"base"}
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
        in_block = "." in path
        if path.rsplit(".", 1)[-1] in targets or ("all-linear" in targets and in_block):
            _wrap(model, path, rank, alpha, dropout, rslora)
    return model


def _wrap(model: nn.Module, path: str, *options) -> nn.Module:
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
# PEFT's format. A linear's tensors are called base_model.model.<Hugging Face's name>.lora_A.weight, an embedding's
# .lora_embedding_A. Names and row order of Hugging Face are the model's business: save and load are handed its to_hf / from_hf.


def save_adapter(model: nn.Module, path, to_hf, *, base_model: str, rank, alpha, dropout, rslora, weights=None) -> None:
    """Write adapter_config.json and adapter_model.safetensors (fp32).

    to_hf(name, tensor) -> (name, tensor) in Hugging Face's layout; base_model: where the frozen weights are;
    weights: the adapter's tensors by name, if not the model's own; the rest as given to add_lora."""
    tensors, targets = {}, set()
    for name, tensor in (weights or lora_parameters(model)).items():
        module, matrix = name.rsplit(".", 1)
        hf_name, tensor = to_hf(f"{module}.{matrix}.weight", tensor.detach().cpu())
        hf_module = hf_name.removesuffix(f".{matrix}.weight")
        targets.add(hf_module.rsplit(".", 1)[-1])
        if isinstance(model.get_submodule(module), LoRAEmbedding):
            leaf = matrix.replace("lora_", "lora_embedding_")
        else:
            leaf = f"{matrix}.weight"
        tensors[f"base_model.model.{hf_module}.{leaf}"] = tensor.contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    readable(path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_adapter(path, from_hf) -> tuple[dict, dict[str, torch.Tensor]]:
    """An adapter's configuration and its tensors by their names here. Raises LoRAError for what is missing, broken, not LoRA."""
    path = Path(path)
    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        stored = load_file(path / "adapter_model.safetensors")
    except FileNotFoundError as error:
        raise LoRAError(f"no adapter in {path}: {Path(error.filename or 'adapter_model.safetensors').name} is missing") from None
    except (ValueError, SafetensorError) as error:
        raise LoRAError(f"the adapter in {path} cannot be read, it may be cut short: {error}") from None
    for field in ("r", "lora_alpha"):
        if not isinstance(config, dict) or field not in config:
            raise LoRAError(f"{path / 'adapter_config.json'} lacks {field}")
    unsupported = {
        "peft_type": config.get("peft_type") != "LORA",
        "use_dora": config.get("use_dora", False),
        "bias": config.get("bias", "none") != "none",
        "modules_to_save": bool(config.get("modules_to_save")),
        "rank_pattern": bool(config.get("rank_pattern")),
        "alpha_pattern": bool(config.get("alpha_pattern")),
    }
    for field, bad in unsupported.items():
        if bad:
            raise LoRAError(f"{path / 'adapter_config.json'}: {field} = {config.get(field)!r} is not plain LoRA")
    tensors = {}
    for name, tensor in stored.items():
        if name.endswith(".base_layer.weight"):  # PEFT adds a copy of the frozen embedding when that has an adapter
            continue
        name = name.removeprefix("base_model.model.").replace("lora_embedding_", "lora_")
        name = name.removesuffix(".weight")
        if not name.endswith((".lora_A", ".lora_B")):  # whole weights, or another method's
            raise LoRAError(f"{path / 'adapter_model.safetensors'}: {name} is not plain LoRA")
        try:
            ours, tensor = from_hf(f"{name}.weight", tensor)
        except RuntimeError:  # no whole heads to reorder
            raise LoRAError(f"the adapter in {path}: {name} is {tuple(tensor.shape)}; another base model?") from None
        tensors[ours.removesuffix(".weight")] = tensor
    if not tensors:
        raise LoRAError(f"{path / 'adapter_model.safetensors'} holds no adapter")
    return config, tensors


def load_adapter(model: nn.Module, path, from_hf) -> nn.Module:
    """Wrap the modules that the adapter in `path` (ours or PEFT's) was trained for and give them its weights. Returns the model.

    from_hf(name, tensor) is the inverse of save_adapter's to_hf. The whole model is frozen but for the adapter."""
    config, tensors = read_adapter(path, from_hf)
    model.requires_grad_(False)
    options = config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0), config.get("use_rslora", False)
    for module in sorted({name.rsplit(".", 1)[0] for name in tensors}):
        try:
            _wrap(model, module, *options)
        except AttributeError:
            raise LoRAError(f"the adapter in {path} is for {module}, which this model does not have") from None
    own = lora_parameters(model)
    for name in sorted(own.keys() | tensors.keys()):
        if name not in tensors or own[name].shape != tensors[name].shape:
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            raise LoRAError(f"the adapter in {path}: {name} is {found}, expected {tuple(own[name].shape)}; another base model?")
        own[name].data.copy_(tensors[name])
    return model
