"""model.py is Llama 2, and its files are Meta's and Hugging Face's. Smallest part first: when one breaks you know which.

The reference without any library is `reference` below: the same mathematics in float64, one head and one document at a time,
RoPE as complex numbers. Tests marked live hold both against transformers."""

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import model as model_module
from lora import add_lora
from model import (
    PRESETS,
    CheckpointError,
    KVCache,
    Llama,
    ModelConfig,
    apply_rope,
    attention_over_documents,
    attention_over_keys,
    from_hf,
    load_model,
    read_config,
    rope_table,
    save_hf,
    save_meta,
    summed_loss,
    textbook_attention,
    to_hf,
)
from weights.reading import meta_hidden_dim

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"

SIZES = {
    "multi-head": {"n_kv_heads": 4, "vocab_size": 97},
    "grouped-query": {"dim": 48, "n_heads": 6, "n_kv_heads": 2, "hidden_dim": 40, "vocab_size": 131, "rope_theta": 1e6},
    "one key head, three layers": {"n_kv_heads": 1, "n_layers": 3, "norm_eps": 1e-6},
}
every_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
both_methods = pytest.mark.parametrize("method", ["sdpa", "textbook"])


def random_tokens(n, vocab_size=96, seed=1):
    return torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(seed))


def same(a: Llama, b: Llama) -> bool:
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------------------------------
# The reference


def rotate(x, theta):
    """RoPE of x (T, D) at positions 0, 1, ...: neighbouring pairs are complex numbers, and turn."""
    t, d = x.shape
    pairs = torch.complex(x[:, 0::2], x[:, 1::2])  # (T, D/2)
    angles = torch.arange(t).double()[:, None] * theta ** (-torch.arange(0, d, 2).double() / d)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.stack((turned.real, turned.imag), dim=-1).reshape(t, d)


def attend(q, k, v):
    """One head of one document: q, k, v (T, D)."""
    rows = [((q[i] @ k[: i + 1].T) / math.sqrt(q.shape[1])).softmax(-1) @ v[: i + 1] for i in range(len(q))]
    return torch.stack(rows)


def norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def reference_attention(w, x, config):
    q, k, v = x @ w["wq.weight"].T, x @ w["wk.weight"].T, x @ w["wv.weight"].T
    d, heads = config.head_dim, []
    for h in range(config.n_heads):
        g = h * config.n_kv_heads // config.n_heads  # the key and value head that this query head shares
        mine, shared = slice(h * d, (h + 1) * d), slice(g * d, (g + 1) * d)
        heads.append(attend(rotate(q[:, mine], config.rope_theta), rotate(k[:, shared], config.rope_theta), v[:, shared]))
    return torch.cat(heads, dim=-1) @ w["wo.weight"].T


def under(weights, prefix):
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def reference_block(w, x, config):
    h = norm(x, w["attention_norm.weight"], config.norm_eps)
    x = x + reference_attention(under(w, "attention."), h, config)
    h = norm(x, w["ffn_norm.weight"], config.norm_eps)
    gate, up = h @ w["feed_forward.w1.weight"].T, h @ w["feed_forward.w3.weight"].T
    return x + (gate / (1 + (-gate).exp()) * up) @ w["feed_forward.w2.weight"].T


def reference(weights, tokens, config):
    """The logits (T, V) of one document."""
    x = weights["tok_embeddings.weight"][tokens]
    for i in range(config.n_layers):
        x = reference_block(under(weights, f"layers.{i}."), x, config)
    return norm(x, weights["norm.weight"], config.norm_eps) @ weights["output.weight"].T


def in_float64(module):
    return {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}


def close(ours, theirs, atol=1e-4):
    torch.testing.assert_close(ours.double(), theirs.double(), atol=atol, rtol=atol)


def cu(*borders):
    return torch.tensor(borders, dtype=torch.int32)


# ---------------------------------------------------------------------------------------------------------------------
# Parts


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_rope_is_multiplication_by_complex_numbers(theta):
    config = ModelConfig(dim=64, n_heads=4, n_kv_heads=4, rope_theta=theta)
    x = torch.randn(300, 4, 16)
    rotated = apply_rope(x, rope_table(torch.arange(300), config))
    for head in range(4):
        close(rotated[:, head], rotate(x[:, head].double(), theta))


def test_rope_makes_scores_depend_on_distance_alone():
    config = ModelConfig(dim=16, n_heads=1, n_kv_heads=1)
    q, k = torch.randn(1, 1, 16), torch.randn(1, 1, 16)

    def score(m, n):
        q_m = apply_rope(q, rope_table(torch.tensor([m]), config))
        return (q_m * apply_rope(k, rope_table(torch.tensor([n]), config))).sum()

    close(score(7, 2), score(105, 100))
    assert abs(score(7, 2) - score(7, 3)) > 1e-3


@pytest.mark.live
@every_size
def test_rope_after_the_row_reorder_is_transformers_rope(sizes, tiny_llama):
    """Meta turns neighbouring rows, transformers rows half a head apart. Wrong pairs babble."""
    hf = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = tiny_llama(**sizes).config
    weight, x = torch.randn(config.dim, config.dim), torch.randn(50, config.dim)
    ours = apply_rope((x @ weight.T).unflatten(-1, (-1, config.head_dim)), rope_table(torch.arange(50), config))
    name, theirs = to_hf("layers.0.attention.wq.weight", weight, config)
    q = (x @ theirs.T).unflatten(-1, (-1, config.head_dim)).transpose(0, 1)[None]  # (1, H, T, D)
    cos, sin = hf.LlamaRotaryEmbedding(hf_config(config))(x, torch.arange(50)[None])
    q, _ = hf.apply_rotary_pos_emb(q, q, cos, sin)
    back = from_hf(name, q[0].transpose(1, 2).flatten(0, 1), config)[1].unflatten(0, (-1, config.head_dim))  # rows to our order
    close(ours, back.permute(2, 0, 1))


def test_rmsnorm_is_its_equation(tiny_llama):
    ours = tiny_llama().norm
    x = torch.randn(7, 32) * 30
    close(ours(x), norm(x.double(), ours.weight.double(), 1e-5), atol=1e-5)
    small = torch.randn(7, 32) * 1e-3  # here eps matters
    close(ours(small), norm(small.double(), ours.weight.double(), 1e-5), atol=1e-5)


def test_rmsnorm_squares_in_fp32(tiny_llama):
    """300 squared is beyond fp16: squared there, every such activation would become zero."""
    ours = tiny_llama().norm.half()
    x = torch.full((1, 32), 300.0, dtype=torch.float16)
    close(ours(x), ours.weight[None], atol=1e-2)


@pytest.mark.live
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rmsnorm_is_transformers_rmsnorm(tiny_llama, dtype):
    hf = pytest.importorskip("transformers.models.llama.modeling_llama")
    ours, theirs = tiny_llama().norm.to(dtype), hf.LlamaRMSNorm(32, eps=1e-5).to(dtype)
    theirs.weight.data.copy_(ours.weight)
    x = torch.randn(7, 32, dtype=dtype)
    torch.testing.assert_close(ours(x), theirs(x), atol=0, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6)  # a rounding apart
    exact = norm(x.double(), ours.weight.double(), 1e-5)
    if dtype == torch.bfloat16:  # theirs rounds before the weight too
        assert (ours(x) - exact).abs().mean() < (theirs(x) - exact).abs().mean()


@both_methods
@every_size
def test_attention_is_its_equation(sizes, method, tiny_llama):
    model = tiny_llama(attention=method, **sizes)
    attention, x = model.layers[0].attention, torch.randn(20, model.config.dim)
    ours = attention(x, rope_table(torch.arange(20), model.config), cu(0, 20))
    close(ours, reference_attention(in_float64(attention), x.double(), model.config))


@pytest.mark.parametrize("method", ["sdpa", "one by one"])  # the latter with heads repeated, as GPUs without varlen need
def test_fused_attention_equals_textbook_over_documents(method):
    q, k, v = torch.randn(30, 6, 8), torch.randn(30, 2, 8), torch.randn(30, 2, 8)
    borders = cu(0, 1, 12, 30)
    close(attention_over_documents(q, k, v, borders, method), attention_over_documents(q, k, v, borders, "textbook"), atol=1e-5)


@pytest.mark.parametrize(("device", "kv_heads"), [("cpu", 2), ("meta", 6)])
def test_shared_heads_are_spread_out_where_the_fused_kernel_does_not_know_them(monkeypatch, device, kv_heads):
    """On CUDA only flash attention takes fewer key heads than query heads: with a mask, in fp32, or on a T4 PyTorch would turn
    to separate operations, which keep the T x T scores of every head. Meta stands here for a GPU."""
    given = []
    fused = lambda q, k, v, mask, is_causal, enable_gqa: given.append((k.shape[1], v.shape[1], enable_gqa)) or q  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    q, k, v = (torch.randn(heads, 12, 8, device=device) for heads in (6, 2, 2))
    attention_over_keys(q, k, v, "sdpa"), attention_over_keys(q[:, 9:], k, v, "sdpa")
    assert given == [(kv_heads, kv_heads, kv_heads == 2)] * 2


@torch.no_grad()
def test_a_gpu_looks_at_few_lengths_of_the_cache_and_reads_the_same(tiny_llama, monkeypatch):
    """Every length is a new shape, for which cuDNN makes a new plan on the host."""
    model, tokens, logits, lengths = tiny_llama(), torch.arange(3, 90), [], [set(), set()]
    fused = F.scaled_dot_product_attention
    for multiple, seen in zip((1, 64), lengths, strict=True):
        cache = KVCache(model.config, 80, "cpu", torch.float32)
        cache.multiple = multiple
        model(tokens[:5], cache=cache)
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, m, s=seen: s.add(k.shape[2]) or fused(q, k, v, m))
        logits.append(torch.cat([model(token[None], cache=cache) for token in tokens[5:80]]))
        monkeypatch.undo()
    assert lengths == [set(range(6, 81)), {64, 80}]
    close(*logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel is CUDA's")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_variable_length_kernel_equals_textbook(dtype):
    torch.manual_seed(0)
    numbers = [torch.randn(300, heads, 64, device="cuda", dtype=dtype) for heads in (6, 2, 2)]
    borders, results = cu(0, 1, 120, 300).cuda(), []
    for method, of in (("sdpa", dtype), ("textbook", torch.float32)):  # textbook in bf16 rounds more than the kernel does
        qkv = [x.to(of, copy=True).requires_grad_() for x in numbers]
        out = attention_over_documents(*qkv, borders, method)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), qkv)))
    for fast, exact in zip(*results, strict=True):
        close(fast, exact, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kv_heads", [6, 2])
def test_attention_in_blocks_of_queries_errs_as_little_as_the_fused_kernel(kv_heads):
    """Documents of less than a block, of one, and of several and a rest; results and gradients against float64. Long queries make
    attention sharp, so that scores in 16 bits would be further off."""
    torch.manual_seed(0)
    numbers = [torch.randn(600, heads, 64).bfloat16() for heads in (6, kv_heads, kv_heads)]
    numbers[0] *= 3
    by_out, borders = torch.randn(600, 6, 64).bfloat16(), cu(0, 1, 100, 228, 600)

    def results(attend, of):
        qkv = [x.to(of, copy=True).requires_grad_() for x in numbers]
        out = attend(*qkv)
        return [x.double() for x in (out, *torch.autograd.grad(out, qkv, by_out.to(of)))]

    def pytorchs(*qkv):
        documents = zip(*(x.transpose(0, 1)[None].split(borders.diff().tolist(), dim=2) for x in qkv), strict=True)
        parts = [F.scaled_dot_product_attention(*document, is_causal=True, enable_gqa=True)[0] for document in documents]
        return torch.cat(parts, dim=1).transpose(0, 1)

    exact = results(partial(attention_over_documents, cu_seqlens=borders, method="textbook"), torch.float64)
    fused = results(pytorchs, torch.bfloat16)
    ours = results(partial(attention_over_documents, cu_seqlens=borders, method="sdpa"), torch.bfloat16)
    for name, a, b, right in zip(("out", "q", "k", "v"), ours, fused, exact, strict=True):
        assert (a - right).norm() <= 1.4 * (b - right).norm(), name
        assert (a - right).norm() <= 4 * torch.finfo(torch.bfloat16).eps * right.norm(), name


def test_attention_in_blocks_continues_a_sequence_that_began_before():
    q, k, v = (torch.randn(heads, 300, 8).bfloat16() for heads in (4, 2, 2))
    whole = attention_over_keys(q, k, v, "sdpa")
    for first in (1, 130, 298):
        close(attention_over_keys(q[:, first:], k, v, "sdpa"), whole[:, first:], atol=0.02)
    close(whole.float(), attention_over_keys(*(x.float() for x in (q, k, v)), "textbook"), atol=0.02)


@torch.no_grad()
def test_a_document_whose_scores_outgrow_the_cache_is_left_to_the_fused_kernel(monkeypatch):
    given = []
    fused = F.scaled_dot_product_attention
    noted = lambda q, *rest, **how: given.append(q.shape[2]) or fused(q, *rest, **how)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    q, k, v = (torch.randn(4148, 1, 8).bfloat16() for _ in range(3))
    attention_over_documents(q, k, v, cu(0, 50, 2098, 4147, 4148), "sdpa")
    assert given == [2049]


def test_attention_in_blocks_is_what_a_cpu_takes_in_bf16_and_under_autocast_the_same():
    q, k, v = (torch.randn(150, 2, 8).bfloat16().requires_grad_() for _ in range(3))
    plain = attention_over_documents(q, k, v, cu(0, 150), "sdpa")
    assert "BlockwiseAttention" in str(plain.grad_fn.next_functions[0][0].next_functions[0][0])
    with torch.autocast("cpu", torch.bfloat16):  # it would take the scores' product, which is in fp32, in 16 bits
        assert torch.equal(plain, attention_over_documents(q, k, v, cu(0, 150), "sdpa"))


def test_unknown_attention_is_an_error():
    with pytest.raises(CheckpointError, match=r"flash.*sdpa, textbook"):
        Llama(ModelConfig(dim=8, n_heads=2, n_kv_heads=2, n_layers=1), attention="flash")


@every_size
def test_block_is_its_equation(sizes, tiny_llama):
    model = tiny_llama(**sizes)
    block, x = model.layers[1], torch.randn(20, model.config.dim)
    ours = block(x, rope_table(torch.arange(20), model.config), cu(0, 20))
    close(ours, reference_block(in_float64(block), x.double(), model.config))


@pytest.mark.live
@every_size
def test_block_is_transformers_block(sizes, tiny_llama):
    """Attention first, then the whole block, so that a difference in the feed-forward layer is told from one in attention."""
    hf = pytest.importorskip("transformers.models.llama.modeling_llama")
    model = tiny_llama(**sizes)
    twin, x, config = hf_twin(model), torch.randn(20, model.config.dim), model.config
    table, theirs = rope_table(torch.arange(20), config), twin.model.layers[1]
    rope = hf.LlamaRotaryEmbedding(hf_config(config))(x, torch.arange(20)[None])
    mask = torch.full((20, 20), float("-inf")).triu(1)[None, None]
    ours = model.layers[1].attention(x, table, cu(0, 20))
    close(ours, theirs.self_attn(x[None], position_embeddings=rope, attention_mask=mask)[0][0])
    expected = theirs(x[None], position_embeddings=rope, attention_mask=mask)
    expected = expected[0] if isinstance(expected, tuple) else expected  # transformers 4 gave a tuple
    close(model.layers[1](x, table, cu(0, 20)), expected.reshape(20, -1))


# ---------------------------------------------------------------------------------------------------------------------
# The whole model


def hf_config(config: ModelConfig):
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaConfig(
        hidden_size=config.dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        intermediate_size=config.hidden_dim,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )


def hf_twin(model: Llama):
    transformers = pytest.importorskip("transformers")
    twin = transformers.LlamaForCausalLM(hf_config(model.config)).float().eval()
    weights = dict(to_hf(name, p.detach(), model.config) for name, p in model.named_parameters())
    twin.load_state_dict(weights, strict=True)
    return twin


def weighted_sum(logits):
    """A loss that every logit pulls on differently."""
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).reshape(logits.shape)
    return (logits * weights).sum() / 10


@both_methods
@every_size
def test_logits_and_all_gradients_are_the_reference(sizes, method, tiny_llama):
    model = tiny_llama(attention=method, **sizes)
    tokens, weights = random_tokens(25, model.config.vocab_size), in_float64(model)
    ours, theirs = model(tokens), reference(weights, tokens, model.config)
    close(ours, theirs)
    weighted_sum(ours).backward()
    weighted_sum(theirs).backward()
    for name, p in model.named_parameters():
        close(p.grad, weights[name].grad, atol=1e-3)


@pytest.mark.live
@both_methods
@every_size
def test_logits_and_all_gradients_are_transformers(sizes, method, tiny_llama):
    model = tiny_llama(attention=method, **sizes)
    twin, tokens = hf_twin(model), random_tokens(40, model.config.vocab_size)
    ours, theirs = model(tokens), twin(tokens[None]).logits[0]
    close(ours, theirs)
    weighted_sum(ours).backward()
    weighted_sum(theirs).backward()
    grads = {name: p.grad for name, p in twin.named_parameters()}
    for name, p in model.named_parameters():
        hf_name, grad = to_hf(name, p.grad, model.config)
        close(grad, grads.pop(hf_name), atol=1e-3)
    assert not grads


def test_logits_are_those_transformers_gave():
    theirs = load_file(GOLDEN / "logits.safetensors")["model"]
    prompt = json.loads((GOLDEN / "greedy.json").read_text())["prompt"]
    close(load_model(GOLDEN / "model")(torch.tensor(prompt)), theirs)


@torch.no_grad()
def test_greedy_decoding_gives_the_64_tokens_transformers_gave():
    model, golden = load_model(GOLDEN / "model"), json.loads((GOLDEN / "greedy.json").read_text())
    cache = KVCache(model.config, 76, "cpu", torch.float32)
    unread, tokens = golden["prompt"], []
    for _ in range(64):
        unread = [model(torch.tensor(unread), cache=cache)[-1].argmax().item()]
        tokens += unread
    assert tokens == golden["tokens"]


SHAPES = {  # dim, multiple_of, ffn_dim_multiplier of Meta's params.json -> hidden_dim
    "7b": (4096, 256, None, 11008),
    "13b": (5120, 256, None, 13824),
    "70b": (8192, 4096, 1.3, 28672),
}


@pytest.mark.parametrize("first", ["model", "weights.reading", "weights.writing", "weights.bitsandbytes"])
def test_model_and_weights_import_each_other_whichever_comes_first(first):
    script = f"import {first}, model; model.load_model, model.save_hf"
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def test_a_new_model_has_small_weights_and_norms_of_one():
    for name, weight in Llama(ModelConfig(dim=64, n_layers=1, n_heads=2, n_kv_heads=2, hidden_dim=96)).named_parameters():
        assert (weight == 1).all() if weight.dim() == 1 else 0.019 < weight.std() < 0.021, name


@pytest.mark.parametrize(("name", "count"), [("7b", 6_738_415_616), ("13b", 13_015_864_320), ("70b", 68_976_648_192)])
def test_sizes_of_llama_2(name, count):
    with torch.device("meta"):
        model = Llama(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", SHAPES)
def test_hidden_size_is_metas_rule(name):
    *given, hidden_dim = SHAPES[name]
    assert meta_hidden_dim(*given) == hidden_dim == PRESETS[name].hidden_dim


def test_the_70b_params_json_of_meta_is_read(tmp_path):
    params = {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80}
    (tmp_path / "params.json").write_text(json.dumps(params | {"norm_eps": 1e-05, "vocab_size": -1}))
    for i in range(8):  # the vocabulary's size is told by the head alone
        torch.save({"output.weight": torch.empty(4000, 1)}, tmp_path / f"consolidated.{i:02d}.pth")
    assert read_config(tmp_path) == PRESETS["70b"]


def test_what_a_config_json_leaves_out_is_what_transformers_takes(tmp_path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 9}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    plain = ModelConfig(64, 2, 4, 4, 96, 9, norm_eps=1e-6, rope_theta=10000.0, max_seq_len=2048)
    assert read_config(tmp_path) == plain
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"num_key_value_heads": None, "head_dim": None}))
    assert read_config(tmp_path) == plain
    rope = {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    (tmp_path / "config.json").write_text(json.dumps(sizes | rope))
    assert read_config(tmp_path) == replace(plain, rope_theta=5e5)


@pytest.mark.parametrize("more", [{}, {"n_kv_heads": None, "ffn_dim_multiplier": None}])
def test_what_a_params_json_leaves_out_is_llama_2s(more, tmp_path):
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5, "vocab_size": 9}
    (tmp_path / "params.json").write_text(json.dumps(params | more))
    assert read_config(tmp_path) == ModelConfig(64, 2, 4, 4, 256, 9, norm_eps=1e-5, rope_theta=10000.0, max_seq_len=4096)


# ---------------------------------------------------------------------------------------------------------------------
# One stream of documents


DOCUMENTS = [5, 1, 9, 3]
BORDERS = cu(0, 5, 6, 15, 18)  # the same, as the model is told


@both_methods
def test_packed_documents_equal_separate_ones(method, tiny_llama):
    """Logits, the loss and every gradient. Control: read as one document, the second one's logits are others."""
    model, tokens = tiny_llama(attention=method), random_tokens(18)
    labels = torch.cat([tokens[1:], tokens[:1]])
    labels[[0, 7, 8]] = -100
    packed, separate = model(tokens, BORDERS), torch.cat([model(t) for t in tokens.split(DOCUMENTS)])
    close(packed, separate, atol=1e-5)
    assert (packed - model(tokens))[6:].abs().max() > 0.1

    loss = model(tokens, BORDERS, labels)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    alone = sum(model(t, labels=y) for t, y in zip(tokens.split(DOCUMENTS), labels.split(DOCUMENTS), strict=True))
    close(loss, alone, atol=1e-5)
    for ours, theirs in zip(grads, torch.autograd.grad(alone, list(model.parameters())), strict=True):
        close(ours, theirs)


def test_positions_restart_at_each_border(tiny_llama, monkeypatch):
    """RoPE is relative, so logits hardly tell; but far into a long stream the angles would lose digits."""
    seen, table = [], model_module.rope_table
    monkeypatch.setattr(model_module, "rope_table", lambda positions, config: seen.extend(positions) or table(positions, config))
    tiny_llama()(random_tokens(18), BORDERS)
    assert seen == [i for n in DOCUMENTS for i in range(n)]


@both_methods
def test_attention_never_crosses_a_border(method, tiny_llama):
    """Other tokens in the third document leave the rest as it was, to the bit."""
    model, tokens = tiny_llama(attention=method), random_tokens(18)
    other = tokens.clone()
    other[6:15] = (other[6:15] + 1) % 96
    before, after = model(tokens, BORDERS), model(other, BORDERS)
    untouched = torch.tensor([*range(6), *range(15, 18)])
    assert torch.equal(before[untouched], after[untouched])
    assert not torch.equal(model(tokens)[15:], model(other)[15:])  # control: as one document it would


def test_a_masked_tail_changes_nothing(tiny_llama):
    model, tokens = tiny_llama(), random_tokens(18)
    labels = tokens.roll(-1)
    expected = torch.autograd.grad(model(tokens, cu(0, 5, 18), labels), list(model.parameters()))
    for fill in (0, 50):
        longer = torch.cat([tokens, torch.full((7,), fill)])
        masked = torch.cat([labels, torch.full((7,), -100)])
        loss = model(longer, cu(0, 5, 18, 25), masked)
        close(loss, model(tokens, cu(0, 5, 18), labels), atol=1e-6)
        for ours, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
            close(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("pieces", [[20], [11, 9], [1] * 20, [4, 1, 15]], ids=["one pass", "two", "token by token", "ragged"])
@both_methods
@torch.no_grad()
def test_cached_decoding_equals_the_full_pass(method, pieces, tiny_llama):
    model, tokens = tiny_llama(attention=method), random_tokens(20)
    full = model(tokens)
    model.train().gradient_checkpointing = True  # which has no part in it: nothing would come into the cache
    cache = KVCache(model.config, 32, "cpu", torch.bfloat16)  # but on a CPU it is fp32
    for piece, end in zip(tokens.split(pieces), torch.tensor(pieces).cumsum(0), strict=True):
        logits = model(piece, cache=cache)
        assert logits.shape == (1, 96) and cache.lengths.tolist() == [end]
        close(logits[0], full[end - 1], atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("chunk", [1, 3, 12, 1024])
def test_summed_loss_is_the_cross_entropy_of_all_logits(chunk, tiny_llama):
    head = tiny_llama().output
    labels = random_tokens(17)
    labels[[0, 4, 5, 9, 16]] = -100  # 12 are left
    results = []
    for hidden in (torch.linspace(-1, 1, 17 * 32).sin().reshape(17, 32).requires_grad_() for _ in range(2)):
        loss = F.cross_entropy(head(hidden), labels, reduction="sum") if results else summed_loss(hidden, head, labels, chunk)
        assert loss.dtype == torch.float32 and loss.shape == ()
        results.append((loss, *torch.autograd.grad(loss / 12, (hidden, head.weight))))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_loss_of_16_bit_models_is_summed_in_fp32(tiny_llama, trained):
    """Each term is near 4.6. Summed in bf16, a thousand of them would be off by several percent."""
    model, tokens = tiny_llama().bfloat16(), random_tokens(1500)
    with torch.set_grad_enabled(trained):
        loss = model(tokens, labels=tokens.roll(-1)).detach()
    with torch.no_grad():
        expected = F.cross_entropy(model(tokens).double(), tokens.roll(-1), reduction="sum")
    assert loss.dtype == torch.float32
    assert abs(loss - expected) / expected < 1e-5


def test_without_labels_the_loss_and_every_gradient_are_zero(tiny_llama):
    """Zero, not None: DDP waits for every weight's gradient on every rank, also on one whose row holds only padding."""
    model, tokens = tiny_llama(), random_tokens(10)
    loss = model(tokens, labels=torch.full((10,), -100))
    loss.backward()
    assert loss.item() == 0
    for name, p in model.named_parameters():
        assert p.grad is not None and not p.grad.any(), name


def test_gradient_checkpointing_recomputes_and_changes_no_gradient(tiny_llama, monkeypatch):
    """The blocks run twice in training, once in evaluation; control: without the switch, once."""
    calls, forward = [], model_module.Block.forward
    monkeypatch.setattr(model_module.Block, "forward", lambda self, *args: calls.append(self) or forward(self, *args))
    model, tokens = tiny_llama(), random_tokens(18)

    def step(switch, train=True):
        calls.clear()
        model.gradient_checkpointing = switch
        model.train(train)
        grads = torch.autograd.grad(model(tokens, BORDERS, tokens.roll(-1)), list(model.parameters()))
        return grads, len(calls)

    plain, once = step(False)
    recomputed, twice = step(True)
    _, evaluation = step(True, train=False)
    assert (once, twice, evaluation) == (2, 4, 2)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_gradient_checkpointing_costs_a_quarter_more_and_a_half_beside_frozen_weights():
    """In FLOPs of matrix products. Beside trained weights the last one, w2's, is not made again: backward does without."""
    for frozen, expected in ((False, 1.25), (True, 1.5)):
        model, counts = Llama(ModelConfig(dim=64, n_layers=4, n_heads=4, n_kv_heads=4, hidden_dim=172, vocab_size=32)), []
        if frozen:
            add_lora(model, rank=1)
        for switch in (False, True):
            model.gradient_checkpointing = switch
            with FlopCounterMode(display=False) as counter:
                model(torch.arange(16)).sum().backward()
            counts.append(counter.get_total_flops())
        assert counts[1] / counts[0] == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("dtype", "matrices"), [(torch.bfloat16, 6), (torch.float32, 4)])
def test_textbook_attention_keeps_the_matrix_of_scores_in_fp32_and_in_16_bits(dtype, matrices):
    """As its docstring counts: bytes for each of H x T x T numbers, beside q, k, v and the mask."""
    kept, (heads, tokens) = {}, (2, 96)
    q, k, v = (torch.randn(heads, tokens, 4, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.ones(tokens, tokens, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x}) or x, lambda x: x):
        textbook_attention(q, k, v, mask)
    scores = [x.nbytes for x in kept.values() if x.numel() == heads * tokens * tokens]
    assert sum(scores) == matrices * heads * tokens * tokens


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_meta_shards_equal_the_unsplit_model(n, kv_heads, tiny_llama, write_meta_shards, tmp_path):
    model = tiny_llama(n_kv_heads=kv_heads)
    assert same(model, load_model(write_meta_shards(model, tmp_path, n)))


@pytest.mark.parametrize("n", [1, 4])
def test_vocabulary_of_minus_one_is_read_off_the_weights(n, tiny_llama, write_meta_shards, tmp_path):
    model = tiny_llama()
    edit_json(write_meta_shards(model, tmp_path, n) / "params.json", vocab_size=-1)
    assert load_model(tmp_path).config == model.config


def test_metas_rope_table_is_ignored(tiny_llama, write_meta_shards, tmp_path):
    """Meta's files carry `rope.freqs`, which is made afresh here."""
    model = tiny_llama()
    edit_weights(write_meta_shards(model, tmp_path, 2) / "consolidated.00.pth", lambda w: w.update({"rope.freqs": torch.ones(4)}))
    assert same(model, load_model(tmp_path))


META_NAMES = """
tok_embeddings.weight norm.weight output.weight
layers.0.attention.wq.weight layers.0.attention.wk.weight layers.0.attention.wv.weight layers.0.attention.wo.weight
layers.0.feed_forward.w1.weight layers.0.feed_forward.w2.weight layers.0.feed_forward.w3.weight
layers.0.attention_norm.weight layers.0.ffn_norm.weight
""".split()


def test_save_meta_writes_metas_names(tiny_llama, tmp_path):
    save_meta(tiny_llama(n_layers=1), tmp_path)
    assert set(torch.load(tmp_path / "consolidated.00.pth", weights_only=True)) == set(META_NAMES)


def test_hugging_face_names_and_back():
    config = ModelConfig(dim=32, n_heads=4, n_kv_heads=2)
    expected = {
        "layers.11.attention.wq.weight": "model.layers.11.self_attn.q_proj.weight",
        "layers.11.attention_norm.weight": "model.layers.11.input_layernorm.weight",
        "layers.1.feed_forward.w2.weight": "model.layers.1.mlp.down_proj.weight",
        "norm.weight": "model.norm.weight",
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
    }
    for ours, theirs in expected.items():
        x = torch.randn(32, 32)
        name, y = to_hf(ours, x, config)
        assert name == theirs
        back, z = from_hf(name, y, config)
        assert back == ours and torch.equal(x, z)
        assert torch.equal(x, y) == (".wq." not in ours)


def as_bin(folder, sharded, zipped=True):
    """Turn a folder that save_hf wrote into one of pytorch_model*.bin. Before PyTorch 1.6 they were no zip archives."""
    for file in folder.glob("*.safetensors"):
        to = folder / file.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(load_file(file), to, _use_new_zipfile_serialization=zipped)
        file.unlink()
    if sharded:
        old = folder / "model.safetensors.index.json"
        text = old.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        old.unlink()


@pytest.mark.parametrize("kind", ["safetensors", "bin", "old bin"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "index"])
def test_every_hugging_face_format_loads(kind, sharded, tiny_llama, tmp_path):
    model = tiny_llama(rope_theta=1e6, norm_eps=1e-6, max_seq_len=512)
    save_hf(model, tmp_path, max_shard_bytes=30_000 if sharded else 10**9)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == sharded
    if kind != "safetensors":
        as_bin(tmp_path, sharded, zipped=kind == "bin")
    loaded = load_model(tmp_path)
    assert same(model, loaded) and loaded.config == model.config


@pytest.mark.parametrize("stale", ["index of safetensors", "bin", "index of bin"])
def test_of_a_folder_saved_into_twice_the_weights_are_those_transformers_takes(stale, tiny_llama, tmp_path):
    """A save of one file over one of several leaves the old index; so does a save of safetensors over .bin."""
    model, old = tiny_llama(), tiny_llama(seed=1)
    save_hf(old, tmp_path, max_shard_bytes=10**9 if stale == "bin" else 30_000)
    if stale != "index of safetensors":
        as_bin(tmp_path, sharded=stale == "index of bin")
    save_hf(model, tmp_path)
    assert len(list(tmp_path.iterdir())) > 2
    loaded = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_shards_are_as_large_as_they_may_be_and_the_index_counts_them(tiny_llama, tmp_path):
    model = tiny_llama()
    save_hf(model, tmp_path, max_shard_bytes=30_000)
    sizes = [sum(x.nbytes for x in load_file(file).values()) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert max(sizes) <= 30_000 and all(a + b > 30_000 for a, b in pairwise(sizes))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes) == sum(p.nbytes for p in model.parameters())


def test_save_hf_says_what_ends_a_text_and_whose_tensors_these_are(tiny_llama, tmp_path):
    """Older transformers refuse a file that names no format."""
    save_hf(tiny_llama(), tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["bos_token_id"], fields["eos_token_id"], fields["tie_word_embeddings"]) == (1, 2, False)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_of_a_folder_in_both_formats_sizes_and_weights_are_metas(tiny_llama, tmp_path):
    """Sizes of the one and weights of the other would load as well, with another rotation."""
    model = tiny_llama()
    save_hf(tiny_llama(seed=1, rope_theta=1e6), tmp_path)
    save_meta(model, tmp_path)
    loaded = load_model(tmp_path)
    assert same(model, loaded) and loaded.config == model.config


def test_a_tensor_in_two_files_is_refused(tiny_llama, tmp_path):
    """Which of the two is meant, nothing says: the last one read would win."""
    save_hf(tiny_llama(), tmp_path, max_shard_bytes=30_000)
    first, *_, last = sorted(tmp_path.glob("*.safetensors"))
    name, weight = next(iter(load_file(first).items()))
    edit_weights(last, lambda w: w.update({name: weight + 1}))
    refused(tmp_path, name, "two files", last.name)


def test_a_transposed_view_in_a_bin_becomes_plain_rows(tiny_llama, tmp_path):
    """The optimizers take a weight as flat, which a view in another order is not."""
    model = tiny_llama()
    save_hf(model, tmp_path)
    weights = {
        name: w.t().contiguous().t() if w.dim() == 2 else w for name, w in load_file(tmp_path / "model.safetensors").items()
    }
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    for loaded, weight in zip(load_model(tmp_path).parameters(), model.parameters(), strict=True):
        assert loaded.is_contiguous() and torch.equal(loaded, weight)


def test_old_rope_tables_in_hugging_face_files_are_ignored(tiny_llama, tmp_path):
    model = tiny_llama()
    save_hf(model, tmp_path)
    add = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    edit_weights(tmp_path / "model.safetensors", lambda weights: weights.update(add))
    assert same(model, load_model(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_from_meta_through_hugging_face_is_exact(dtype, tiny_llama, tmp_path):
    model = tiny_llama(rope_theta=1e6, norm_eps=1e-6, max_seq_len=512).to(dtype)
    save_meta(model, tmp_path / "a")
    save_hf(load_model(tmp_path / "a", dtype=dtype), tmp_path / "b")
    assert {x.dtype for x in load_file(tmp_path / "b" / "model.safetensors").values()} == {dtype}
    save_meta(load_model(tmp_path / "b", dtype=dtype), tmp_path / "c")
    final = load_model(tmp_path / "c", dtype=dtype)
    assert same(model, final) and final.config == model.config
    assert (tmp_path / "a" / "params.json").read_bytes() == (tmp_path / "c" / "params.json").read_bytes()


def test_every_hidden_size_survives_params_json():
    """params.json holds a rule, not the size. Every size to 3 x 64 wide, and the sizes of the presets."""
    cases = [(dim, hidden) for dim in (48, 64) for hidden in range(1, 3 * dim)]
    for dim, hidden in cases + [(p.dim, p.hidden_dim) for p in PRESETS.values()] + [(4096, 14336), (2048, 5632), (5120, 13823)]:
        multiplier = (hidden + 0.5) / int(2 * (4 * dim) / 3)
        assert meta_hidden_dim(dim, 1, multiplier) == hidden


@pytest.mark.parametrize("hidden_dim", [1, 85, 86, 256, 511, 512, 49, 499])  # the last two: x / 85 * 85 falls short of x
def test_hidden_size_survives_save_meta(hidden_dim, tiny_llama, tmp_path):
    model = tiny_llama(n_layers=1, hidden_dim=hidden_dim)
    save_meta(model, tmp_path)
    assert same(model, load_model(tmp_path))


def test_loading_casts_to_the_asked_dtype(tiny_llama, tmp_path):
    model = tiny_llama()
    save_hf(model, tmp_path)
    loaded = load_model(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert same(model.bfloat16(), loaded)


@pytest.mark.parametrize("save", [save_meta, save_hf])
def test_a_loaded_model_does_not_change_with_its_file(save, tiny_llama, tmp_path):
    """A weight that needs no cast must not stay a view of the memory-mapped file: a file written over would change the model."""
    model = tiny_llama()
    save(model, tmp_path)
    loaded = load_model(tmp_path)
    for file in [*tmp_path.glob("*.pth"), *tmp_path.glob("*.safetensors")]:
        with open(file, "r+b") as f:
            f.write(b"\xff" * os.path.getsize(file))
    assert same(model, loaded)


def test_training_a_loaded_model_leaves_the_file_alone(tiny_llama, tmp_path):
    save_meta(tiny_llama(), tmp_path)
    before = (tmp_path / "consolidated.00.pth").read_bytes()
    with torch.no_grad():
        for p in load_model(tmp_path).parameters():
            p.zero_()
    assert (tmp_path / "consolidated.00.pth").read_bytes() == before


@pytest.mark.live
@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000], ids=["one file", "index"])
@every_size
def test_transformers_opens_what_save_hf_writes(sizes, max_shard_bytes, tiny_llama, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokens = tiny_llama(**sizes), random_tokens(30)
    save_hf(model, tmp_path, max_shard_bytes=max_shard_bytes)
    theirs, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    close(model(tokens), theirs(tokens[None]).logits[0])


@pytest.mark.live
def test_save_hf_opens_in_its_dtype(tiny_llama, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_hf(tiny_llama(), tmp_path, dtype=torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype="auto")
    assert theirs.dtype == torch.bfloat16


@pytest.mark.live
@every_size
def test_what_transformers_writes_opens_here(sizes, tiny_llama, tmp_path):
    model = tiny_llama(**sizes)
    hf_twin(model).save_pretrained(tmp_path)
    assert same(model, load_model(tmp_path))


WATCH = """
import json, sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from model import load_model
from quant import QUANTIZERS

def resident():  # memory of its own, in bytes: pages of a mapped file are the kernel's to drop
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

class Watch(TorchDispatchMode):
    peak = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.peak = max(self.peak, resident())
        return out

kind = QUANTIZERS[sys.argv[3]]
load_model(sys.argv[2], quantize=kind)  # a tiny one, so that what Python and torch need once is there
start = resident()
with Watch() as watch:
    model = load_model(sys.argv[1], quantize=kind)
    loaded = watch.peak - start
    copies = [p.detach().clone() for p in model.parameters()]
size = sum(p.nbytes for p in model.parameters())
largest = max(p.nbytes for p in model.parameters())
print(json.dumps({"size": size, "largest": largest, "loaded": loaded, "twice": watch.peak - start}))
"""


def watch_loading(folder, quantize: str) -> dict:
    """What loading folder / "model" took, in bytes, in a process of its own."""
    seen = subprocess.run(
        [sys.executable, "-c", WATCH, str(folder / "model"), str(folder / "tiny"), quantize],
        env=os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"},  # freed tensors go back at once
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(seen.stdout)


ON_LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of memory")


@ON_LINUX
@pytest.mark.parametrize("kind", ["meta", "meta shards", "hugging face"])
def test_loading_needs_the_model_and_about_one_tensor_more(kind, tiny_llama, write_meta_shards, tmp_path):
    """30 MB in tensors of at most 2 MB. Control: a second copy of the model is seen by the same measurement."""
    model = tiny_llama(dim=512, n_layers=3, n_heads=8, n_kv_heads=8, hidden_dim=1024, vocab_size=64)
    if kind == "hugging face":
        save_hf(model, tmp_path / "model")
    else:
        write_meta_shards(model, tmp_path / "model", 1 if kind == "meta" else 4)
    save_hf(tiny_llama(), tmp_path / "tiny")
    seen = watch_loading(tmp_path, "none")
    bound = seen["size"] + 3 * seen["largest"]  # a tensor as read, as reordered, and some air
    assert 0.9 * seen["size"] < seen["loaded"] < bound < seen["twice"]


@ON_LINUX
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_model_quantised_while_loading_never_exists_in_16_bits(quantize, tiny_llama, tmp_path):
    """Matrices of 1 MB in fp32: the temporaries of one of them are beside the packed model, and no second matrix."""
    model = tiny_llama(dim=512, n_layers=16, n_heads=8, n_kv_heads=8, hidden_dim=512, vocab_size=64)
    save_hf(model, tmp_path / "model")
    save_hf(tiny_llama(), tmp_path / "tiny")
    seen = watch_loading(tmp_path, quantize)
    assert 0.9 * seen["size"] < seen["loaded"] < seen["size"] + 8 * 2**20
    assert seen["size"] + 8 * 2**20 < 2 * sum(weight.numel() for weight in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# What is broken is refused, by name


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_json(path, key):
    fields = json.loads(path.read_text())
    del fields[key]
    path.write_text(json.dumps(fields))


def edit_weights(path, change):
    """Let `change` alter the dictionary of tensors in a file."""
    if path.suffix == ".safetensors":
        weights = load_file(path)
        change(weights)
        save_file(weights, path)
    else:
        weights = torch.load(path, weights_only=True)
        change(weights)
        torch.save(weights, path)


def cut(path, keep=0.6):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


class Trap:
    """Unpickling this would make a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def refused(path, *words):
    """load_model raises CheckpointError, and its message holds every word."""
    with pytest.raises(CheckpointError) as error:
        load_model(path)
    for word in words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


META = {  # what is done to a folder of four shards: the words that the error must hold
    "params.json cut short": (lambda p: cut(p / "params.json"), ["params.json"]),
    "params.json a list": (lambda p: (p / "params.json").write_text("[]"), ["params.json"]),
    "params.json not text": (lambda p: (p / "params.json").write_bytes(b"\xff\xfe\x00"), ["params.json"]),
    "params.json without a field": (lambda p: drop_json(p / "params.json", "norm_eps"), ["params.json", "norm_eps"]),
    "params.json with text for a number": (lambda p: edit_json(p / "params.json", dim="wide"), ["params.json"]),
    "params.json with no heads": (lambda p: edit_json(p / "params.json", n_heads=0), ["params.json"]),
    "params.json with a fraction for a size": (lambda p: edit_json(p / "params.json", dim=32.0), ["params.json", "dim is 32.0"]),
    "params.json without an epsilon": (
        lambda p: edit_json(p / "params.json", norm_eps=None),
        ["norm_eps is None"],
    ),
    "rope of Llama 3.1": (lambda p: edit_json(p / "params.json", use_scaled_rope=True), ["params.json", "use_scaled_rope"]),
    "params.json with heads that do not divide": (lambda p: edit_json(p / "params.json", n_heads=5), ["n_heads 5"]),
    "no weights": (lambda p: [f.unlink() for f in p.glob("*.pth")], ["consolidated.*.pth"]),
    "first shard missing": (lambda p: (p / "consolidated.00.pth").unlink(), ["consolidated.00.pth"]),
    "middle shard missing": (lambda p: (p / "consolidated.01.pth").unlink(), ["consolidated.01.pth"]),
    "last shard missing": (lambda p: (p / "consolidated.03.pth").unlink(), ["tok_embeddings.weight", "3 shards"]),
    "shard twice": (lambda p: shutil.copyfile(p / "consolidated.01.pth", p / "consolidated.02.pth"), ["hold the same", "copy"]),
    "whole model over shards": (
        lambda p: torch.save({n: w.detach() for n, w in load_model(p).named_parameters()}, p / "consolidated.00.pth"),
        ["4 shards", "left from another download"],
    ),
    "shard cut short": (lambda p: cut(p / "consolidated.02.pth"), ["consolidated.02.pth"]),
    "shard cut to its first bytes": (lambda p: cut(p / "consolidated.02.pth", 0.01), ["consolidated.02.pth"]),
    "shard empty": (lambda p: cut(p / "consolidated.02.pth", 0), ["consolidated.02.pth"]),
    "shard no checkpoint": (lambda p: (p / "consolidated.02.pth").write_text("<html>404</html>" * 99), ["consolidated.02.pth"]),
    "shard not of names": (lambda p: torch.save([torch.ones(2)], p / "consolidated.02.pth"), ["consolidated.02.pth"]),
    "tensor missing": (
        lambda p: [edit_weights(f, lambda w: w.pop("layers.1.feed_forward.w3.weight")) for f in p.glob("*.pth")],
        ["layers.1.feed_forward.w3.weight"],
    ),
    "tensor missing in one shard": (
        lambda p: edit_weights(p / "consolidated.02.pth", lambda w: w.pop("layers.1.attention.wo.weight")),
        ["consolidated.02.pth", "layers.1.attention.wo.weight"],
    ),
    "tensor extra": (
        lambda p: edit_weights(p / "consolidated.00.pth", lambda w: w.update({"layers.2.attention.wq.weight": torch.ones(2)})),
        ["unknown", "layers.2.attention.wq.weight"],
    ),
    "tensor of a wrong shape": (
        lambda p: edit_weights(
            p / "consolidated.03.pth", lambda w: w.update({"layers.0.attention.wk.weight": torch.ones(4, 31)})
        ),
        ["layers.0.attention.wk.weight", "(16, 32)"],
    ),
    "entry that is no tensor": (
        lambda p: [edit_weights(f, lambda w: w.update({"norm.weight": "ones"})) for f in p.glob("*.pth")],
        ["norm.weight"],
    ),
    "vocabulary unknown and no head": (
        lambda p: (
            edit_json(p / "params.json", vocab_size=-1),
            [edit_weights(f, lambda w: w.pop("output.weight")) for f in p.glob("*.pth")],
        ),
        ["output.weight"],
    ),
}


@pytest.mark.parametrize("name", META)
def test_broken_meta_folder_is_refused(name, tiny_llama, write_meta_shards, tmp_path):
    damage, words = META[name]
    damage(write_meta_shards(tiny_llama(), tmp_path, 4))
    refused(tmp_path, *words)


def edit_hf(change):
    return lambda p: edit_weights(p / "model.safetensors", change)


def hf_field(**changes):
    return lambda p: edit_json(p / "config.json", **changes)


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
HF = {
    "config.json cut short": (lambda p: cut(p / "config.json"), ["config.json"]),
    "config.json a list": (lambda p: (p / "config.json").write_text("[]"), ["config.json"]),
    "config.json without a field": (lambda p: drop_json(p / "config.json", "vocab_size"), ["config.json", "vocab_size"]),
    "another model": (hf_field(model_type="mistral"), ["model_type", "mistral"]),
    "another activation": (hf_field(hidden_act="gelu"), ["hidden_act", "gelu"]),
    "stretched rope": (hf_field(rope_scaling={"type": "linear", "factor": 2.0}), ["rope_scaling", "linear"]),
    "stretched rope of transformers 5": (
        hf_field(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}),
        ["rope", "llama3"],
    ),
    "rope that is a word": (hf_field(rope_scaling="linear"), ["rope_scaling", "config.json"]),
    "packing that is a word": (hf_field(quantization_config="nf4"), ["quantization_config", "config.json"]),
    "an odd size of a head": (hf_field(num_attention_heads=32, num_key_value_heads=32), ["config.json", "heads of even size"]),
    "a switch for a size": (hf_field(num_hidden_layers=True), ["config.json", "n_layers is True"]),
    "a rotation of nothing": (hf_field(rope_theta=0), ["config.json", "rope_theta is 0"]),
    "no epsilon": (hf_field(rms_norm_eps=None), ["config.json", "norm_eps is None"]),
    "a fraction for a size": (hf_field(vocab_size=96.0), ["config.json", "vocab_size is 96.0"]),
    "attention bias": (hf_field(attention_bias=True), ["attention_bias"]),
    "feed-forward bias": (hf_field(mlp_bias=True), ["mlp_bias"]),
    "tied embeddings": (hf_field(tie_word_embeddings=True), ["tie_word_embeddings"]),
    "quantised weights": (hf_field(quantization_config={"quant_method": "gptq"}), ["gptq", "nf4 is read"]),
    "heads of another size": (hf_field(head_dim=16), ["head_dim", "16"]),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), ["safetensors"]),
    "file cut short": (lambda p: cut(p / "model.safetensors"), ["model.safetensors"]),
    "file cut in its header": (lambda p: cut(p / "model.safetensors", 0.01), ["model.safetensors"]),
    "file empty": (lambda p: cut(p / "model.safetensors", 0), ["model.safetensors"]),
    "tensor missing": (edit_hf(lambda w: w.pop(Q_PROJ)), ["lacks", "layers.1.attention.wq.weight"]),
    "a layer missing": (
        edit_hf(lambda w: [w.pop(name) for name in list(w) if ".layers.1." in name]),
        ["lacks layers.1.attention.wk.weight, layers.1.attention.wo.weight, layers.1.attention.wq.weight and 6 more"],
    ),
    "tensor extra": (edit_hf(lambda w: w.update({Q_PROJ.replace("weight", "bias"): torch.ones(32)})), ["unknown", "wq.bias"]),
    "tensor of a wrong width": (edit_hf(lambda w: w.update({Q_PROJ: torch.ones(32, 24)})), ["wq.weight", "(32, 24)", "(32, 32)"]),
    "tensor of a wrong height": (
        edit_hf(lambda w: w.update({Q_PROJ: torch.ones(44, 32)})),
        ["wq.weight", "(44, 32)", "(32, 32)"],
    ),
    "tensor of integers": (edit_hf(lambda w: w.update({Q_PROJ: torch.ones(32, 32, dtype=torch.int8)})), ["wq.weight", "int8"]),
    "tensor twice, once by a name without model.": (
        edit_hf(lambda w: w.update({Q_PROJ.removeprefix("model."): torch.ones(32, 32)})),
        [Q_PROJ, "layers.1.self_attn.q_proj.weight is called"],
    ),
    "tensor by Meta's name": (
        edit_hf(lambda w: w.update({"layers.1.attention.wq.weight": w.pop(Q_PROJ)})),
        [Q_PROJ, "layers.1.attention.wq.weight is called"],
    ),
    "tensor of one axis": (edit_hf(lambda w: w.update({Q_PROJ: torch.ones(3)})), ["wq.weight", "(3,)"]),
}


@pytest.mark.parametrize("name", HF)
def test_broken_hugging_face_folder_is_refused(name, tiny_llama, tmp_path):
    damage, words = HF[name]
    save_hf(tiny_llama(), tmp_path)
    damage(tmp_path)
    refused(tmp_path, *words)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_index_naming_a_missing_file_is_refused(kind, tiny_llama, tmp_path):
    save_hf(tiny_llama(), tmp_path, max_shard_bytes=30_000)
    if kind == "bin":
        as_bin(tmp_path, sharded=True)
    gone = sorted(tmp_path.glob(f"*model-00002-*.{kind}"))[0]
    gone.unlink()
    refused(tmp_path, gone.name)


@pytest.mark.parametrize("index", ["{}", "[]", '{"weight_map": []}', '{"weight_map": {"norm.weight": 1}}', '{"weight_map"'])
def test_broken_index_is_refused(index, tiny_llama, tmp_path):
    save_hf(tiny_llama(), tmp_path, max_shard_bytes=30_000)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    refused(tmp_path, "model.safetensors.index.json")


def test_truncated_bin_is_refused(tiny_llama, tmp_path):
    save_hf(tiny_llama(), tmp_path)
    as_bin(tmp_path, sharded=False)
    cut(tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin")


def test_absent_folder_and_empty_folder_and_file_are_refused(tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "not a folder")
    refused(tmp_path, str(tmp_path), "params.json", "config.json")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "file", "not a folder")


@pytest.mark.parametrize("zipped", [True, False], ids=["torch.save", "bare pickle"])
def test_a_pickle_that_holds_code_is_refused_and_not_run(zipped, tiny_llama, write_meta_shards, tmp_path):
    write_meta_shards(tiny_llama(), tmp_path, 1)
    payload, target = {"norm.weight": Trap(tmp_path / "ran")}, tmp_path / "consolidated.00.pth"
    torch.save(payload, target) if zipped else target.write_bytes(pickle.dumps(payload))
    refused(tmp_path, "consolidated.00.pth", "it holds code, not only tensors, and was not run")
    assert not (tmp_path / "ran").exists()
    torch.load(target, weights_only=False) if zipped else pickle.loads(target.read_bytes())
    assert (tmp_path / "ran").exists()  # control: the trap works
