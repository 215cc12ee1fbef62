"""Exercises in lora.py. Each test is red until you have written what it names; its docstring says what, and why one would."""

import torch

import lora
from model import Llama, ModelConfig

SIZES = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=56, vocab_size=96)


def test_plus():
    """LoRA+ ("LoRA+: Efficient Low Rank Adaptation of Large Models"): B begins at zero and A does not, yet both get one learning
    rate. Write `lora_plus(model, rate, ratio)`, the groups for AdamW: the A's at `rate`, the B's at `ratio` times that."""
    adapted = lora.add_lora(Llama(SIZES), rank=2)
    groups = lora.lora_plus(adapted, 1e-4, ratio=16)
    rates = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(lora.lora_parameters(adapted)) == len(rates)
    for name, weight in lora.lora_parameters(adapted).items():
        assert abs(rates[id(weight)] - (1e-4 if name.endswith("lora_A") else 16e-4)) < 1e-9, name
    torch.optim.AdamW(groups)  # takes them


def test_magnitude():
    """DoRA ("DoRA: Weight-Decomposed Low-Rank Adaptation"): train the length of each row of the weight apart from its direction.
    Write `dora(weight, update, magnitude)`: the rows of weight + update, each scaled to the length in `magnitude` (out,).
    With the lengths that the rows of W have and an update of zero it must be W itself, or training would not begin there."""
    torch.manual_seed(0)
    weight, update, lengths = torch.randn(6, 4), torch.randn(6, 4), torch.rand(6) + 0.5
    torch.testing.assert_close(lora.dora(weight, torch.zeros(6, 4), weight.norm(dim=1)), weight)
    moved = lora.dora(weight, update, lengths)
    torch.testing.assert_close(moved.norm(dim=1), lengths)
    torch.testing.assert_close(torch.cosine_similarity(moved, weight + update), torch.ones(6))
