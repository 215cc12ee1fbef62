"""Exercises in model.py. Each test is red until you have changed what it names; its docstring says what, and why one would."""

import pytest
import torch

import model

SIZES = model.ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=56, vocab_size=96)


def test_window():
    """A sliding window. Give `attention_over_keys` one more argument, `window=None`: with window=3 a token looks at itself and at
    the two before it, no further; Mistral 7B does so with 4,096. (Do it in the mask; method "textbook" is enough at first.) How
    far back does the last of 32 layers still look, through the others?"""
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 5, 8), torch.randn(2, 6, 8), torch.randn(2, 6, 8)  # the queries are of the last 5 of 6 tokens
    near = model.attention_over_keys(q, k, v, "textbook", window=3)
    for token in range(6):
        other = v.clone()
        other[:, token] += 1
        heard = (model.attention_over_keys(q, k, other, "textbook", window=3) != near).any(-1).all(0)
        assert heard.tolist() == [token <= i + 1 < token + 3 for i in range(5)]
    far = model.attention_over_keys(q, k, v, "textbook")
    torch.testing.assert_close(model.attention_over_keys(q, k, v, "textbook", window=6), far)  # as it was


def test_positions():
    """A longer window by squeezed positions ("Extending Context Window of Large Language Models via Positional Interpolation").
    Give `rope_table` one more argument, `squeeze=1.0`, by which positions are divided: a model trained on 4,096 tokens then reads
    16,384 with squeeze=4 and meets no angle beyond those it knows, only ones between them, to which fine-tuning accustoms it."""
    positions = torch.arange(9)
    plain, squeezed = model.rope_table(positions, SIZES), model.rope_table(positions, SIZES, squeeze=4.0)
    torch.testing.assert_close(squeezed[[0, 4, 8]], plain[[0, 1, 2]])
    torch.testing.assert_close(model.rope_table(positions, SIZES, squeeze=1.0), plain)


def test_tied():
    """Tied embeddings. The embedding turns a token into a vector, the head compares a vector with each token's: some models, such
    as Llama 3.2 1B, use one table for both. Write `tie(llama)`: afterwards the head's weight *is* the embedding's. What share of
    7B's weights does that save? Why is it more of a 1B's?"""
    llama = model.Llama(SIZES)
    before = sum(weight.numel() for weight in llama.parameters())
    model.tie(llama)
    assert before - sum(weight.numel() for weight in llama.parameters()) == 96 * 32
    tokens = torch.arange(10)
    llama(tokens, labels=tokens + 1).backward()
    unread = llama.tok_embeddings.weight.grad[50]  # no token 50 came in: what moves its row came from the head
    assert unread.abs().sum() > 0 and llama.output.weight.grad is llama.tok_embeddings.weight.grad


@pytest.mark.parametrize("training", [True, False])
def test_noise(training):
    """NEFTune ("Noisy Embeddings Improve Instruction Finetuning"): in training add noise to what the embedding says, drawn evenly
    from -s to s with s = alpha / sqrt(tokens x dim). Write `add_noise(llama, alpha)`; it need not touch the class, as
    `llama.tok_embeddings.register_forward_hook` lets you change what comes out. Answers must stay as they are: none in eval()."""
    torch.manual_seed(0)
    llama, tokens = model.Llama(SIZES).train(training), torch.arange(40)
    plain = llama.tok_embeddings(tokens)
    model.add_noise(llama, alpha=5.0)
    noise = llama.tok_embeddings(tokens) - plain
    bound = 5.0 / (40 * 32) ** 0.5
    if training:
        assert noise.abs().max() <= bound + 1e-6 and noise.abs().mean() > 0.4 * bound
    else:
        assert not noise.any()
