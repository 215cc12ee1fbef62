"""Writing a model into a folder, in Meta's format or Hugging Face's, as their own programs open it.

Both write plain files into the folder; who calls them hands a temporary one and renames it when it is whole.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from helping.files import readable
from model import CheckpointError, Llama, ModelConfig
from quant import NF4Linear, QuantError
from weights.bitsandbytes import rows_after, to_bitsandbytes
from weights.names import TO_HF, rename, to_hf
from weights.reading import meta_hidden_dim


def save_meta(model: Llama, path) -> None:
    """Write params.json and consolidated.00.pth, the format of Meta's download (one shard)."""
    path, config = Path(path), model.config
    path.mkdir(parents=True, exist_ok=True)
    params = {
        "dim": config.dim,
        "multiple_of": 256,
        "n_heads": config.n_heads,
        "n_layers": config.n_layers,
        "norm_eps": config.norm_eps,
        "vocab_size": config.vocab_size,
    }
    if meta_hidden_dim(config.dim, 256, None) != config.hidden_dim:
        # Any other width: the stretch that rounds down to it (half a unit more, so that float rounding cannot miss it).
        params |= {"multiple_of": 1, "ffn_dim_multiplier": (config.hidden_dim + 0.5) / int(2 * (4 * config.dim) / 3)}
    if config.n_kv_heads != config.n_heads:
        params["n_kv_heads"] = config.n_kv_heads
    if config.rope_theta != 10000.0:
        params["rope_theta"] = config.rope_theta
    if config.max_seq_len != 4096:
        params["max_seq_len"] = config.max_seq_len
    (path / "params.json").write_text(json.dumps(params, indent=2) + "\n")
    torch.save({name: weight.detach().cpu() for name, weight in model.named_parameters()}, path / "consolidated.00.pth")


def save_hf(
    model: Llama, path, *, dtype: torch.dtype | None = None, max_shard_bytes: int = 5 * 10**9, whole=lambda x: x, write=True
) -> None:
    """Write config.json and model.safetensors (several shards and an index above 5 GB) as transformers reads them.

    dtype: what to store the weights in, as they are by default. What is in NF4 stays in NF4, in bitsandbytes' layout, exactly.
    Holds one shard at a time beside the model. Where the weights are spread over processes, whole(weight) gathers one, all
    processes call this together, and one of them writes."""
    path, config = Path(path), model.config
    dtype = dtype or model.norm.weight.dtype
    packed = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    weights, parts_of = dict(model.named_parameters()), {}
    for name, module in packed.items():
        parts_of[name] = sum(weights.pop(f"{name.removesuffix('weight')}{part}").nbytes for part, _ in module.named_parameters())

    def tensors_of(name):
        if name not in packed:
            weight = whole(weights[name].detach())
            return dict([to_hf(name, weight.to("cpu", dtype), config)]) if write else {}
        module, hf_name = packed[name], rename(name, TO_HF)
        try:
            parts = to_bitsandbytes(module.packed(), rows_after(to_hf, name, module.out_features, config), dtype)
        except QuantError as error:
            raise CheckpointError(f"{name} {error}") from None
        return {hf_name if part == "weight" else f"{hf_name}.{part}": tensor for part, tensor in parts.items()}

    sizes = {name: weight.numel() * dtype.itemsize for name, weight in weights.items()} | parts_of
    shards, room = [[]], max_shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size

    index, total = {}, 0
    for i, shard in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {hf_name: tensor.contiguous() for name in shard for hf_name, tensor in tensors_of(name).items()}
        if not write:
            continue
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path / file, metadata={"format": "pt"})
        readable(path / file)
        index |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if not write:
        return
    if len(shards) > 1:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (path / "model.safetensors.index.json").write_text(text + "\n")
    fields = hf_fields(config, dtype, bool(packed))
    if packed:  # transformers packs what is not named here, and of the head it knows
        plain = [rename(name, TO_HF)[:-7] for name, weight in weights.items() if name.startswith("layers.") and weight.dim() > 1]
        fields["quantization_config"] |= {"llm_int8_skip_modules": ["lm_head", *plain]} if plain else {}
    (path / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def hf_fields(config: ModelConfig, dtype: torch.dtype, packed: bool) -> dict:
    """config.json. packed: the linears of the blocks are in NF4."""
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_seq_len,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if packed:
        fields["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
        }
    return fields
