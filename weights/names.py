"""Hugging Face's names and row order, for weights and adapters alike: all that differs between its files and Meta's.

RoPE turns pairs of numbers. Meta pairs neighbours, (0, 1), (2, 3), ...; Hugging Face pairs number i with number i + D/2 of a
head, and stores the rows of wq and wk in the order that makes both compute the same."""

import torch

TO_HF = {
    "layers": "model.layers",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}
FROM_HF = {theirs: ours for ours, theirs in TO_HF.items()}


def rename(name: str, table: dict[str, str]) -> str:
    """A tensor's name after TO_HF or FROM_HF. Whole words between dots only: "norm" is not to be found in "attention_norm"."""
    name = f".{name}"
    for old, new in table.items():
        name = name.replace(f".{old}.", f".{new}.", 1)
    return name[1:]


def _reorder(name: str, tensor: torch.Tensor, pairs: tuple[int, int]) -> torch.Tensor:
    """Query and key rows belong to RoPE's pairs: Meta keeps a pair side by side, Hugging Face half a head apart.
    Only what has these rows is touched: the weight itself, and LoRA's B; LoRA's A has rank rows."""
    if not (".wq." in name or ".wk." in name) or "lora_A" in name:
        return tensor
    return tensor.unflatten(0, (-1, *pairs)).transpose(1, 2).flatten(0, 2)


def to_hf(name: str, tensor: torch.Tensor, config) -> tuple[str, torch.Tensor]:
    """A tensor of this model (`layers.0.attention.wq.weight`) with Hugging Face's name and row order
    (`model.layers.0.self_attn.q_proj.weight`). Adapters too: `layers.0.attention.wq.lora_B.weight`."""
    return rename(name, TO_HF), _reorder(name, tensor, (config.head_dim // 2, 2))


def from_hf(name: str, tensor: torch.Tensor, config) -> tuple[str, torch.Tensor]:
    """The inverse of `to_hf`, exact to the bit."""
    name = rename(name, FROM_HF)
    return name, _reorder(name, tensor, (2, config.head_dim // 2))
