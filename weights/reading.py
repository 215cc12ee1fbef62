"""Reading a model from a folder, as Meta or Hugging Face publish it, one tensor at a time.

    params.json  consolidated.00.pth consolidated.01.pth ...    Meta's: every matrix cut into as many shards as there are files
    config.json  model*.safetensors or pytorch_model*.bin       Hugging Face's: whole tensors, in one file or several and an index

The sizes come first, and an empty model of these sizes says which tensors there must be. Each is then read through a memory map,
brought into this model's order of rows, cast, quantised if asked, and placed before the next is touched: the peak is the model
plus one tensor. What is missing, extra, broken or wrongly shaped is refused by the name of its file or tensor, and nothing in a
file is ever run.
"""

import copy
import json
import pickle
import zipfile
from itertools import groupby, pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from model import CheckpointError, Llama, ModelConfig
from quant import NF4Linear, dequantize_nf4
from weights.bitsandbytes import from_bitsandbytes, rows_after
from weights.names import FROM_HF, TO_HF, from_hf, rename

# ---------------------------------------------------------------------------------------------------------------------
# The sizes


def read_config(path) -> ModelConfig:
    """The sizes of the model in a folder, from Meta's params.json or Hugging Face's config.json."""
    path = Path(path)
    if (path / "params.json").is_file():
        return _meta_config(path)
    if (path / "config.json").is_file():
        return _hf_config(path / "config.json")
    what = "has neither params.json (Meta) nor config.json (Hugging Face)" if path.is_dir() else "is not a folder"
    raise CheckpointError(f"no model at {path}: it {what}")


def _read_json(path: Path) -> dict:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} holds a {type(fields).__name__}, not named fields")
    return fields


def _meta_config(folder: Path) -> ModelConfig:
    p = _read_json(folder / "params.json")
    if p.get("use_scaled_rope"):  # Llama 3.1's; in config.json it is a rope_scaling
        raise CheckpointError(f"{folder / 'params.json'}: use_scaled_rope is not Llama 2's, and this model does not have it")
    try:
        vocab_size = p.get("vocab_size", -1)
        if vocab_size == -1:  # Meta left it to the tokenizer; the head's rows, spread over the shards, say the same
            vocab_size = sum(len(shard["output.weight"]) for shard in _open_meta(folder))
        n_heads = p["n_heads"]
        return ModelConfig(
            dim=p["dim"],
            n_layers=p["n_layers"],
            n_heads=n_heads,
            n_kv_heads=p.get("n_kv_heads") or n_heads,
            hidden_dim=meta_hidden_dim(p["dim"], p.get("multiple_of", 256), p.get("ffn_dim_multiplier")),
            vocab_size=vocab_size,
            norm_eps=p["norm_eps"],
            rope_theta=p.get("rope_theta", 10000.0),
            max_seq_len=p.get("max_seq_len", 4096),  # which Meta's own files do not say: Llama 1 has 2,048
        )
    except KeyError as error:
        raise CheckpointError(f"{folder / 'params.json'} or its weights lack {error}") from None
    except (TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder / 'params.json'} has a field that is not a size: {error}") from None


def meta_hidden_dim(dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """Meta's rule: 2/3 of 4 x dim (SwiGLU has three matrices where others have two), stretched, rounded up to a multiple."""
    hidden_dim = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        hidden_dim = int(ffn_dim_multiplier * hidden_dim)
    return multiple_of * -(-hidden_dim // multiple_of)


def is_in_4_bits(path: str | Path) -> bool:
    """Whether the folder's linears are packed, as bitsandbytes does it: read_config refuses all other packings."""
    return not (Path(path) / "params.json").is_file() and bool(_read_json(Path(path) / "config.json").get("quantization_config"))


def _hf_config(path: Path) -> ModelConfig:
    p = _read_json(path)
    rope = p.get("rope_parameters") or p.get("rope_scaling") or {}  # transformers 5 keeps theta in here as well
    packing = p.get("quantization_config") or {}
    if not isinstance(rope, dict) or not isinstance(packing, dict):
        raise CheckpointError(f"{path}: rope_scaling or quantization_config is not named fields")
    refused = {
        "model_type": p.get("model_type", "llama") != "llama",
        "hidden_act": p.get("hidden_act", "silu") != "silu",
        "rope_scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
        "attention_bias": p.get("attention_bias", False),
        "mlp_bias": p.get("mlp_bias", False),
        "tie_word_embeddings": p.get("tie_word_embeddings", False),
    }
    for field, bad in refused.items():
        if bad:
            found = rope if field == "rope_scaling" else p.get(field)
            raise CheckpointError(f"{path}: {field} = {found!r} is not Llama 2's, and this model does not have it")
    if packing and not (packing.get("load_in_4bit") and packing.get("bnb_4bit_quant_type") == "nf4"):
        method = packing.get("quant_method", "an unnamed method")
        bits = ", in 8 bits" if packing.get("load_in_8bit") else ""
        kind = f", as {packing.get('bnb_4bit_quant_type', 'fp4')}" if packing.get("load_in_4bit") else ""
        raise CheckpointError(f"{path}: the weights are quantised by {method}{bits}{kind}; only bitsandbytes' nf4 is read")
    try:
        config = ModelConfig(
            dim=p["hidden_size"],
            n_layers=p["num_hidden_layers"],
            n_heads=p["num_attention_heads"],
            n_kv_heads=p.get("num_key_value_heads") or p["num_attention_heads"],
            hidden_dim=p["intermediate_size"],
            vocab_size=p["vocab_size"],
            norm_eps=p.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta", p.get("rope_theta", 10000.0)),
            max_seq_len=p.get("max_position_embeddings", 2048),
        )
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}") from None
    except (TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} has a field that is not a size: {error}") from None
    if p.get("head_dim") not in (None, config.head_dim):
        raise CheckpointError(f"{path}: head_dim {p['head_dim']} is not hidden_size / num_attention_heads = {config.head_dim}")
    return config


# ---------------------------------------------------------------------------------------------------------------------
# The files


def open_torch(path: Path) -> dict[str, torch.Tensor]:
    """A .pth or .bin as a dictionary of tensors, memory-mapped. weights_only: a pickle can run any code, so none is let run."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except pickle.UnpicklingError as error:
        reason = str(error).replace("\n", " ")
        refused = "Unsupported" in reason or "GLOBAL" in reason
        why = "it holds code, not only tensors, and was not run" if refused else "it is cut short or is no checkpoint"
        raise CheckpointError(f"{path} cannot be read: {why}") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error) or "it is empty").splitlines()[0]
        raise CheckpointError(f"{path} cannot be read, it may be cut short: {reason}") from None
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path} holds a {type(tensors).__name__}, not named tensors")
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{path}: {name} is a {type(tensor).__name__}, not a tensor")
    return tensors


def _open_meta(folder: Path) -> list[dict[str, torch.Tensor]]:
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths:
        raise CheckpointError(f"{folder} has params.json but no consolidated.*.pth beside it")
    for i, path in enumerate(paths):
        if path.name != f"consolidated.{i:02d}.pth":
            raise CheckpointError(f"{folder / f'consolidated.{i:02d}.pth'} is missing: found {', '.join(p.name for p in paths)}")
    return [open_torch(path) for path in paths]


def _join(name: str, parts: list[torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """Meta's model-parallel shards as one tensor. Each matrix was cut along the axis that its layer splits the work by
    (wq, wk, wv, w1, w3, output by rows; wo, w2, tok_embeddings by columns); norms are whole in every shard."""
    if len(parts) == 1 or (len(shape) == 1 and parts[0].shape == shape):
        return parts[0]
    if any(torch.equal(a, b) for a, b in pairwise(parts)):
        raise CheckpointError(f"{name}: two neighbouring shards hold the same; is one consolidated.*.pth a copy of another?")
    for axis in range(len(shape)):
        others = [p.shape[:axis] + p.shape[axis + 1 :] for p in parts]
        if all(o == shape[:axis] + shape[axis + 1 :] for o in others) and sum(p.shape[axis] for p in parts) == shape[axis]:
            return torch.cat(parts, dim=axis)
    raise CheckpointError(
        f"{name}: {len(parts)} shards of {tuple(parts[0].shape)} do not join to {tuple(shape)}; is a consolidated.*.pth missing, "
        "or left from another download?"
    )


def _open_hf(folder: Path) -> dict:
    """Every tensor of a Hugging Face folder by its name there, as a function that reads it."""
    # In transformers' order: of a folder saved into twice it is the same files that are read here and there.
    kinds = [f"{file}{end}" for file in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
    files = [file for file in kinds if (folder / file).is_file()][:1]
    if not files:
        raise CheckpointError(f"{folder} has config.json but none of {', '.join(kinds)} beside it")
    if files[0].endswith(".index.json"):
        index = folder / files[0]
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{index} has no weight_map of tensors to files")
        files = sorted(set(weight_map.values()))
    readers = {}
    for path in (folder / file for file in files):
        if path.suffix == ".safetensors":
            try:
                file = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise CheckpointError(f"{path} is missing") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} cannot be read, it may be cut short: {error}") from None
            names = file.keys()
            more = {name: lambda file=file, name=name: file.get_tensor(name) for name in names}
        else:
            more = {name: lambda tensor=tensor: tensor for name, tensor in open_torch(path).items()}
        for name in more:
            if name in readers:
                raise CheckpointError(f"{folder}: {name} stands in two files, {path.name} and one before it")
            theirs = rename(rename(name, FROM_HF), TO_HF)
            if theirs != name:  # Meta's names, say: whose order of rows would it be?
                raise CheckpointError(f"{path}: {name} is called {theirs} in Hugging Face's format, which config.json stands for")
        readers |= more
    return readers


def open_checkpoint(path, config: ModelConfig) -> dict:
    """Every tensor of the model in a folder: its name here -> a function that reads it, whole and in this model's row order.
    A linear that bitsandbytes packed in 4 bits is read as a dictionary of its parts, rows as they are.

    Raises CheckpointError naming what is missing, what is extra, and any tensor of a wrong shape when it is read."""
    path = Path(path)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Llama(config).named_parameters()}

    if (path / "params.json").is_file():
        shards = _open_meta(path)
        found = {name for shard in shards for name in shard if name != "rope.freqs"}  # a table, made afresh here

        def read(name):
            absent = [i for i, shard in enumerate(shards) if name not in shard]
            if absent:
                raise CheckpointError(f"{path / f'consolidated.{absent[0]:02d}.pth'} lacks {name}")
            return _join(name, [shard[name] for shard in shards], shapes[name])

    else:
        readers = {rename(name, FROM_HF): (name, reader) for name, reader in _open_hf(path).items()}
        readers = {name: x for name, x in readers.items() if not name.endswith("rotary_emb.inv_freq")}  # the same, in old files
        packed = {}  # in a checkpoint of 4 bits: the parts beside wq.weight, such as wq.weight.absmax
        for name in [name for name in readers if ".weight." in name]:
            weight, part = name.split(".weight.")
            packed.setdefault(weight + ".weight", {})[part] = readers.pop(name)[1]
        found = readers.keys() | packed.keys()

        def read(name):
            if name not in readers:
                raise CheckpointError(f"{path}: {name} is packed, but its codes are missing")
            hf_name, reader = readers[name]
            tensor = reader()  # of a wrong shape, it may have no whole heads to reorder, and is refused below
            if name in packed:
                return {"weight": tensor} | {part: read_part() for part, read_part in packed[name].items()}
            return from_hf(hf_name, tensor, config)[1] if tensor.shape == shapes[name] else tensor

    missing, extra = sorted(shapes.keys() - found), sorted(found - shapes.keys())
    for what, names in (("lacks", missing), ("has unknown", extra)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(f"the checkpoint in {path} {what} {', '.join(names[:3])}{more}")

    def checked(name):
        tensor = read(name)
        if not isinstance(tensor, dict) and tensor.shape != shapes[name]:
            raise CheckpointError(f"{path}: {name} is {tuple(tensor.shape)}, expected {tuple(shapes[name])}")
        if not isinstance(tensor, dict) and not tensor.is_floating_point():  # codes, whose scales are not here
            raise CheckpointError(f"{path}: {name} holds {str(tensor.dtype)[6:]}, not weights in floating point")
        return tensor

    return {name: lambda name=name: checked(name) for name in shapes}


# ---------------------------------------------------------------------------------------------------------------------
# The model


def load_model(
    path, *, device="cpu", dtype: torch.dtype = torch.float32, attention: str = "sdpa", quantize=None, each_part=None
) -> Llama:
    """The model in a folder: params.json + consolidated.*.pth (Meta, any number of shards), or config.json + *.safetensors
    or pytorch_model*.bin (Hugging Face, one file or several with an index).

    Each tensor is read through a memory map, cast to `dtype` and placed on `device` before the next is touched.
    quantize (quant.py's NF4Linear or Int8Linear): makes every linear of the blocks from its weight as the file has it, so the
    whole model never exists in 16 bits; embedding, norms and head stay in `dtype`. NF4Linear also takes what bitsandbytes packed
    in 4 bits, bits unchanged; linears that such a checkpoint has in 16 bits then stay so.
    each_part(model, name): called when a block ("layers.3") is in place, and at the end for the rest (""), so that a block can
    be cut into shards before the next is read.
    Raises CheckpointError naming the file or the tensor for anything missing, extra, broken or wrongly shaped."""
    config = read_config(path)
    with torch.device("meta"):  # shapes without storage
        model = Llama(config, attention)
    readers = open_checkpoint(path, config)
    # What a checkpoint in 4 bits has in 16 was left so on purpose, as too much would be lost.
    in_4_bits = is_in_4_bits(path)

    def place(name):
        path_to, leaf = name.rsplit(".", 1)
        module, weight = model.get_submodule(path_to), readers[name]()
        try:
            if isinstance(weight, dict):
                if not issubclass(quantize or nn.Linear, NF4Linear):
                    raise ValueError("is packed in 4 bits: --quantize nf4, or --method qlora, uses it so")
                rows = rows_after(from_hf, name, module.weight.shape[0], config)
                packed = from_bitsandbytes(weight, module.weight.shape, rows, device)
                if module is model.output:  # which is in 16 bits here
                    module.weight = nn.Parameter(dequantize_nf4(packed, dtype))
                else:
                    model.set_submodule(path_to, quantize(packed))
            elif quantize and isinstance(module, nn.Linear) and module is not model.output and not in_4_bits:
                model.set_submodule(path_to, quantize(weight.to(device)))
            else:
                # copy: a tensor that needed no cast would stay a view of the file, which may change or go
                # and row by row: a .bin may hold a transposed view, which an optimizer would not take as flat
                weight = weight.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
                setattr(module, leaf, nn.Parameter(weight))
        except ValueError as error:
            raise CheckpointError(f"{path}: {name} {error}") from None

    _place_all(model, place, each_part)
    return model


def _place_all(model: Llama, place, each_part) -> None:
    """place(name) for every parameter, block after block; see load_model for each_part."""
    names = [name for name, _ in model.named_parameters()]
    for part, of_part in groupby(names, key=lambda name: ".".join(name.split(".")[:2]) if name.startswith("layers.") else ""):
        for name in of_part:
            place(name)
        if part and each_part:
            each_part(model, part)
    if each_part:
        each_part(model, "")


def random_model(
    config: ModelConfig, *, device, dtype: torch.dtype, attention: str = "sdpa", quantize=None, each_part=None
) -> Llama:
    """A model of these sizes as `load_model` would place it, with weights of no meaning: to measure, not to train.

    All matrices of one shape get the same numbers, so 7B takes seconds to make and to quantise."""
    with torch.device("meta"):  # shapes without storage
        model = Llama(config, attention)
    drawn = {}  # the first module of a shape, and what its parameters were before anyone cut them

    def place(name):
        path, weight = name.removesuffix(".weight"), model.get_parameter(name)
        module = model.get_submodule(path)
        packed = quantize is not None and isinstance(module, nn.Linear) and module is not model.output
        if (weight.shape, packed) in drawn:
            first, parameters = drawn[weight.shape, packed]
            module = copy.copy(first) if packed else module
            same = {x: nn.Parameter(p.detach().clone(), p.requires_grad) for x, p in parameters.items()}
            module._parameters = module._parameters | same
        else:
            values = torch.randn(weight.shape, device=device, dtype=dtype).mul_(0.02).add_(weight.dim() == 1)
            if packed:
                module = quantize(values)
            else:
                module.weight = nn.Parameter(values)
            drawn[weight.shape, packed] = module, dict(module.named_parameters())
        model.set_submodule(path, module)

    _place_all(model, place, each_part)
    return model
