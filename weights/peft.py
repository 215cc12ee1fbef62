"""An adapter as PEFT writes it: adapter_config.json and adapter_model.safetensors.

A linear's tensors are called base_model.model.<Hugging Face's name>.lora_A.weight, an embedding's .lora_embedding_A. Names and
row order of Hugging Face are the model's business: save and load are handed its to_hf / from_hf (names.py)."""

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from helping.files import readable
from lora import LoRAEmbedding, LoRAError, lora_parameters, wrap
from weights.reading import open_torch

MERGED = "; where PEFT can merge it (merge_and_unload), --model opens the result"


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
    """An adapter's configuration and its tensors by their names here; `output.base_layer` is a copy that PEFT adds, see below.

    Raises LoRAError for what is missing, broken, not LoRA."""
    path = Path(path)
    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        file = path / "adapter_model.safetensors"
        old = file.with_suffix(".bin")  # of PEFT's first year
        stored = open_torch(old) if old.is_file() and not file.is_file() else load_file(file)
    except FileNotFoundError as error:
        raise LoRAError(f"no adapter in {path}: {Path(error.filename or 'adapter_model.safetensors').name} is missing") from None
    except (ValueError, SafetensorError) as error:
        raise LoRAError(f"the adapter in {path} cannot be read, it may be cut short: {error}") from None
    if not isinstance(config, dict):
        raise LoRAError(f"{path / 'adapter_config.json'} holds a {type(config).__name__}, not named fields")
    began = str(config.get("init_lora_weights")).lower()
    unsupported = {
        "peft_type": config.get("peft_type") != "LORA",
        "use_dora": config.get("use_dora", False),
        "bias": config.get("bias", "none") != "none",
        "modules_to_save": bool(config.get("modules_to_save")),
        "rank_pattern": bool(config.get("rank_pattern")),
        "alpha_pattern": bool(config.get("alpha_pattern")),
        "layer_replication": bool(config.get("layer_replication")),
        "alora_invocation_tokens": bool(config.get("alora_invocation_tokens")),  # A and B act behind these tokens only
        # These take what A and B begin as off the frozen weights, which the adapter's file does not hold.
        "init_lora_weights": began.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")),
    }
    for field, bad in unsupported.items():
        if bad:
            raise LoRAError(f"{path / 'adapter_config.json'}: {field} = {config.get(field)!r} is not plain LoRA{MERGED}")
    for field in ("r", "lora_alpha"):
        if field not in config:
            raise LoRAError(f"{path / 'adapter_config.json'} lacks {field}")
    r, alpha, dropout = config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0)
    numbers = isinstance(r, int) and isinstance(alpha, int | float) and isinstance(dropout, int | float)
    if not (numbers and r >= 1 and math.isfinite(alpha) and 0 <= dropout <= 1):
        found = f"r = {r!r}, lora_alpha = {alpha!r}, lora_dropout = {dropout!r}"
        raise LoRAError(f"{path / 'adapter_config.json'}: {found} are not a rank, a finite number and a share")
    tensors = {}
    for name, tensor in stored.items():
        name = name.removeprefix("base_model.model.").replace("lora_embedding_", "lora_")
        name = name.removesuffix(".weight")
        if not name.endswith((".lora_A", ".lora_B", ".base_layer")):  # whole weights, or another method's
            raise LoRAError(f"{path / 'adapter_model.safetensors'}: {name} is not plain LoRA{MERGED}")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise LoRAError(f"the adapter in {path}: {name} ({str(tensor.dtype)[6:]}) is not all finite floating-point numbers")
        try:
            ours, tensor = from_hf(f"{name}.weight", tensor)
        except RuntimeError:  # no whole heads to reorder
            raise LoRAError(f"the adapter in {path}: {name} is {tuple(tensor.shape)}; another base model?") from None
        ours = ours.removesuffix(".weight")
        if ours == name or ours in tensors:  # Meta's names, say: whose order of rows would it be?
            raise LoRAError(f"the adapter in {path}: {name} is there twice, or is not Hugging Face's name of a part of Llama")
        tensors[ours] = tensor
    if not tensors:
        raise LoRAError(f"{path / 'adapter_model.safetensors'} holds no adapter")
    return config, tensors


def load_adapter(model: nn.Module, path, from_hf) -> nn.Module:
    """Wrap the modules that the adapter in `path` (ours or PEFT's) was trained for and give them its weights. Returns the model.

    from_hf(name, tensor) is the inverse of save_adapter's to_hf. The whole model is frozen but for the adapter."""
    config, tensors = read_adapter(path, from_hf)
    model.requires_grad_(False)
    for name in [name for name in tensors if name.endswith(".base_layer")]:
        # PEFT adds a copy of the frozen embedding or head that has an adapter: it must be this model's, but for its format.
        copy, base = tensors.pop(name), getattr(model, name.removesuffix(".base_layer"), None)
        weight = base and (base.dequantize(copy.dtype) if hasattr(base, "dequantize") else base.weight).to(copy)
        if weight is None or copy.shape != weight.shape or not torch.allclose(copy, weight, rtol=2**-6, atol=1e-5):
            raise LoRAError(f"the adapter in {path}: {name} is not what this model has there; another base model?")
    options = config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0), config.get("use_rslora", False)
    for module in sorted({name.rsplit(".", 1)[0] for name in tensors}):
        try:
            wrap(model, module, *options)
        except AttributeError:
            raise LoRAError(f"the adapter in {path} is for {module}, which this model does not have") from None
    own = lora_parameters(model)
    for name in sorted(own.keys() | tensors.keys()):
        if name not in tensors or own[name].shape != tensors[name].shape:
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            raise LoRAError(f"the adapter in {path}: {name} is {found}, expected {tuple(own[name].shape)}; another base model?")
        own[name].data.copy_(tensors[name])
    return model
