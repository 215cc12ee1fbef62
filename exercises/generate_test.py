"""Exercises in generate.py. Each test is red until you have written what it names; its docstring says what, and why one would."""

import torch

import generate
from model import Llama, ModelConfig


def test_typical():
    """Typical sampling ("Locally Typical Sampling"). People seldom say the likeliest word, nor a very unlikely one: they say what
    is about as surprising as can be expected here. Write `typical(probs, mass)` for probs (B, V): of each row keep the tokens
    whose surprise -log p is nearest the expected one (sum of -p log p), as few as have `mass` together; the others become 0."""
    probs = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.05, 0.05], [0.9, 0.06, 0.01, 0.01, 0.01, 0.01]])
    kept = generate.typical(probs, 0.15)
    assert [row.nonzero().flatten().tolist() for row in kept] == [[1], [0]]  # the first row's likeliest token is no longer there
    kept = generate.typical(probs, 0.6)
    assert [row.nonzero().flatten().tolist() for row in kept] == [[0, 1], [0]]
    assert torch.equal(kept[kept > 0], probs[kept > 0])


def test_score():
    """How likely would the model have said it? Write `score(model, prompt, reply)` for two lists of token ids: the sum of
    log p(token) over the reply, each given all before it, in one pass. With it a model can choose among answers, and training's
    loss is nothing else: the minus of it."""
    torch.manual_seed(0)
    llama = Llama(ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=56, vocab_size=96))
    with torch.no_grad():
        for weight in llama.parameters():
            weight.normal_(std=0.2)
    prompt, reply = [1, 5, 9], [7, 3, 2]
    labels = torch.tensor([-100, -100, 7, 3, 2, -100])
    expected = -llama(torch.tensor(prompt + reply), labels=labels).item()
    with torch.no_grad():
        assert abs(float(generate.score(llama, prompt, reply)) - expected) < 1e-3
