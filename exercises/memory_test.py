"""An exercise with memory.py. The test is red until you have put the right numbers here; its docstring says of what."""

import pytest
import torch

from memory import Tracker
from model import FeedForward, ModelConfig

T, C, F = 64, 32, 88  # tokens, dim, hidden_dim; everything is fp32, 4 bytes a number

ALL_TRAINED = 0  # bytes that forward leaves behind when all three weights are trained
ALL_FROZEN = 0  # ... and when none of them is, but something before them (an adapter in an earlier block)


@pytest.mark.parametrize(("trained", "answer"), [(True, "ALL_TRAINED"), (False, "ALL_FROZEN")])
def test_bytes(trained, answer):
    """What does a feed-forward layer keep for backward? It computes w2(silu(w1 x) * w3 x). Of silu(x) * y backward needs x and y
    (SwiGLU in model.py makes the rest again), of W x the W, and x only if W is trained. Write down ALL_TRAINED and ALL_FROZEN,
    as sums of T, C and F, before you run it: what is alive after forward, the result included, x and the weights not. That
    difference is why LoRA needs less."""
    layer = FeedForward(ModelConfig(dim=C, n_heads=4, n_kv_heads=4, hidden_dim=F)).requires_grad_(trained)
    x = torch.randn(T, C, requires_grad=True)
    with Tracker() as tracker:
        for tensor in (x, *layer.parameters()):
            tracker.watch(tensor)
        before = tracker.live
        result = layer(x)
        kept = tracker.live - before
    assert result.shape == (T, C)
    assert globals()[answer] == kept
