"""lora.py starts as the identity, moves only A and B, learns, merges, and its files are PEFT's."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora import (
    LoRAEmbedding,
    LoRAError,
    LoRALinear,
    add_lora,
    load_adapter,
    lora_parameters,
    merge_lora,
    save_adapter,
)
from model import PRESETS, Llama, from_hf, load_model, save_hf, to_hf

GOLDEN = Path(__file__).parent / "golden"
LINEARS = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
EVERYWHERE = ("all-linear", "tok_embeddings", "output")
TOKENS = torch.tensor([1, 17, 4, 93, 58, 21, 21, 70, 8, 44, 3, 66])


def randomised(model, seed=3):
    """As if trained: A and B both far from zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in lora_parameters(model).values():
            p.normal_(std=0.15)
    return model


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def close(ours, theirs, atol=1e-4):
    torch.testing.assert_close(ours.double(), theirs.double(), atol=atol, rtol=atol)


def train(model, steps, lr=1e-2):
    """The loss before each step of AdamW on A and B."""
    optimizer, losses = torch.optim.AdamW(lora_parameters(model).values(), lr=lr), []
    for _ in range(steps):
        loss = model(TOKENS[:-1], labels=TOKENS[1:]) / 11
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


# ---------------------------------------------------------------------------------------------------------------------
# The method


@pytest.mark.parametrize("targets", [("wq", "w2"), ("output", "wv"), ("all-linear", "tok_embeddings")])
def test_part_by_part_is_the_same_as_all_at_once(tiny_llama, targets):
    """The names of a part that has its adapters already are still known when the next one gets its own."""
    whole, parts = tiny_llama(n_layers=11), tiny_llama(n_layers=11)  # layers.10 begins as layers.1 does, and is no part of it
    add_lora(whole, targets=targets)
    for part in (*(f"layers.{i}" for i in range(11)), ""):
        add_lora(parts, targets=targets, part=part)
    assert lora_parameters(parts).keys() == lora_parameters(whole).keys()
    trained = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (whole, parts)]
    assert trained[0] == trained[1] == lora_parameters(whole).keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [("wq", "wv"), EVERYWHERE])
def test_lora_starts_as_the_identity_to_the_bit(targets, dtype, tiny_llama):
    model = tiny_llama().to(dtype)
    before = model(TOKENS)
    assert torch.equal(before, add_lora(model, targets=targets)(TOKENS))


@pytest.mark.parametrize(("kind", "base"), [(LoRALinear, nn.Linear(6, 4)), (LoRAEmbedding, nn.Embedding(6, 4))])
def test_an_adapter_is_drawn_on_the_cpu_whatever_its_device(kind, base):
    """A GPU draws other numbers from the same seed: a run there would not be the run that it is on a CPU."""
    after = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        drawn = kind(base, 2, 4.0, 0.0, False, device=device)
        assert drawn.lora_A.device.type == drawn.lora_B.device.type == device
        after.append(torch.rand(3))
    assert torch.equal(*after)


def test_an_adapter_begins_with_numbers_of_pefts_size():
    """A uniform up to 1 / sqrt(in); of an embedding B, from N(0, 1). The usual learning rates are for these."""
    linear, table = (
        kind(base(400, 100), 8, 16, 0.0, False) for kind, base in ((LoRALinear, nn.Linear), (LoRAEmbedding, nn.Embedding))
    )
    assert 0.049 < linear.lora_A.abs().max() < 0.05 and 0.028 < linear.lora_A.std() < 0.030
    assert 0.9 < table.lora_B.std() < 1.1
    assert not linear.lora_B.any() and not table.lora_A.any()


def test_only_a_and_b_move(tiny_llama):
    """Two steps, because B is zero at the first, and so A's gradient. In the embedding it is the other way round."""
    model = add_lora(tiny_llama(), targets=EVERYWHERE)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(lora_parameters(model))
    before, moving = snapshot(model), lora_parameters(model).keys()
    train(model, 2)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in moving), name
        assert p.dtype == torch.float32 and (p.grad is None)


@pytest.mark.parametrize("forced_to_zero", [False, True], ids=["LoRA", "control: forced to zero"])
def test_lora_learns(forced_to_zero, tiny_llama):
    """The control must not learn: otherwise something else than LoRA does, and this test says nothing."""
    model = add_lora(tiny_llama())
    if forced_to_zero:
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.scaling = 0.0
    losses = train(model, 30)
    if forced_to_zero:
        assert losses[-1] == losses[0]
    else:
        assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("rslora", [False, True])
def test_gradients_are_those_of_the_explicit_sum(rslora):
    """y = (W + s B A) x in float64, and the gradients of A, B and x."""
    layer = LoRALinear(nn.Linear(24, 40, bias=False).double(), 4, 12, 0.0, rslora)
    nn.init.normal_(layer.lora_B)
    x, pull = torch.randn(9, 24).double().requires_grad_(), torch.randn(9, 40).double()
    a, b = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    s = 12 / 2 if rslora else 12 / 4
    ours, explicit = layer(x), x @ (layer.base.weight.detach() + s * b @ a).T
    close(ours, explicit, atol=1e-12)
    grads = torch.autograd.grad((ours * pull).sum(), (x, layer.lora_A, layer.lora_B))
    expected = torch.autograd.grad((explicit * pull).sum(), (x, a, b))
    close(grads[0], expected[0], atol=1e-12)
    close(grads[1], expected[1], atol=1e-5)  # A's and B's gradients are kept in fp32, as they are
    close(grads[2], expected[2], atol=1e-5)


def test_embedding_gradients_are_those_of_the_explicit_sum():
    layer = LoRAEmbedding(nn.Embedding(30, 16).double(), 4, 12, 0.0, False)
    nn.init.normal_(layer.lora_A)
    tokens, pull = torch.tensor([3, 29, 3, 0]), torch.randn(4, 16).double()
    a, b = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    ours, explicit = layer(tokens), (layer.base.weight.detach() + 3 * (b @ a).T)[tokens]
    close(ours, explicit, atol=1e-12)
    grads = torch.autograd.grad((ours * pull).sum(), (layer.lora_A, layer.lora_B))
    for ours, expected in zip(grads, torch.autograd.grad((explicit * pull).sum(), (a, b)), strict=True):
        close(ours, expected, atol=1e-5)


def test_adapters_are_fp32_on_a_16_bit_model(tiny_llama):
    model = add_lora(tiny_llama().bfloat16(), targets=EVERYWHERE)
    assert {p.dtype for p in lora_parameters(model).values()} == {torch.float32}
    model(TOKENS, labels=TOKENS).backward()
    assert {p.grad.dtype for p in lora_parameters(model).values()} == {torch.float32}


def test_dropout_acts_in_training_only_and_on_the_correction_only():
    layer = LoRALinear(nn.Linear(24, 40, bias=False), 4, 12, 0.5, False)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(9, 24)
    plain = layer.base(x) + 3 * x @ layer.lora_A.T @ layer.lora_B.T
    layer.train()
    assert not torch.allclose(layer(x), layer(x)) and not torch.allclose(layer(x), plain)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    close(layer(x), plain, atol=1e-5)
    nn.init.zeros_(layer.lora_B)
    layer.train()
    assert torch.equal(layer(x), layer.base(x))


def test_scaling_is_alpha_over_rank_or_over_its_root():
    linear, table = nn.Linear(16, 16, bias=False), nn.Embedding(8, 8)
    for kind, base in ((LoRALinear, linear), (LoRAEmbedding, table)):
        assert kind(base, 16, 32, 0.0, rslora=False).scaling == 2
        assert kind(base, 16, 32, 0.0, rslora=True).scaling == 8
        assert kind(base, 8, 16, 0.0, rslora=True).scaling == pytest.approx(16 / math.sqrt(8))


def test_gradient_checkpointing_changes_no_gradient(tiny_llama):
    """The frozen embedding gives the first block an input without gradient: checkpointing may lose A and B there."""
    model = randomised(add_lora(tiny_llama(), targets=("wq", "w2"))).train()
    grads = []
    for switch in (False, True):
        model.gradient_checkpointing = switch
        grads.append(torch.autograd.grad(model(TOKENS, labels=TOKENS), list(lora_parameters(model).values())))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*grads, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Targets


def adapted(model):
    return {name for name, module in model.named_modules() if isinstance(module, LoRALinear | LoRAEmbedding)}


def test_targets_by_name(tiny_llama):
    model = add_lora(tiny_llama(), targets=["wq", "w2", "output"])
    assert adapted(model) == {f"layers.{i}.{m}" for i in (0, 1) for m in ("attention.wq", "feed_forward.w2")} | {"output"}


def test_all_linear_is_every_linear_of_the_blocks_and_not_the_head(tiny_llama):
    model = add_lora(tiny_llama(), targets=["all-linear"])
    assert len(adapted(model)) == 2 * len(LINEARS)
    assert {name.split(".")[-1] for name in adapted(model)} == set(LINEARS)


def test_unknown_target_is_an_error_that_lists_the_known(tiny_llama):
    model = tiny_llama()
    with pytest.raises(LoRAError, match=r"q_proj.*all-linear, output, tok_embeddings, w1, w2, w3, wk, wo, wq, wv"):
        add_lora(model, targets=["wv", "q_proj"])
    assert not adapted(model) and all(p.requires_grad for p in model.parameters())  # and nothing was touched


def test_no_target_and_no_rank_are_errors(tiny_llama):
    with pytest.raises(LoRAError, match="known are all-linear"):
        add_lora(tiny_llama(), targets=[])
    with pytest.raises(LoRAError, match="rank"):
        add_lora(tiny_llama(), rank=0)
    with pytest.raises(LoRAError, match="a rank of 33 is more than any 32 x 32 matrix has"):
        add_lora(tiny_llama(), rank=33, targets=("wq",))


def test_7b_with_rank_2_everywhere_trains_5_141_504_numbers():
    with torch.device("meta"):
        model = add_lora(Llama(PRESETS["7b"]), rank=2, targets=EVERYWHERE)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 5_141_504
    assert all(p.is_meta for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Merging


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_equals_unmerged_and_is_plain(rslora, tiny_llama):
    model = randomised(add_lora(tiny_llama(), targets=EVERYWHERE, rslora=rslora))
    before = model(TOKENS)
    merged = merge_lora(model)
    assert merged is model and not adapted(model) and not lora_parameters(model)
    assert snapshot(merged).keys() == snapshot(tiny_llama()).keys()
    assert (before - tiny_llama()(TOKENS)).abs().max() > 0.1  # control: the adapter did something
    close(merged(TOKENS), before, atol=1e-5 * before.abs().max().item())


def test_merging_bf16_rounds_once(tiny_llama):
    """The sum is taken in fp32: rounding B A first would lose a second half bit."""
    model = randomised(add_lora(tiny_llama().bfloat16(), rank=4, alpha=12, targets=EVERYWHERE))
    weights, expected = snapshot(model), {}
    for name in adapted(model):
        delta = 3 * (weights[f"{name}.lora_B"] @ weights[f"{name}.lora_A"])
        delta = delta.T if name == "tok_embeddings" else delta
        expected[f"{name}.weight"] = (weights[f"{name}.base.weight"].float() + delta).bfloat16()
    merged = snapshot(merge_lora(model))
    assert all(merged[name].dtype == torch.bfloat16 and torch.equal(merged[name], w) for name, w in expected.items())


def test_a_hundred_toggles_of_eval_and_train_change_no_weight(tiny_llama):
    """Where eval() merges and train() unmerges, bf16 loses a tenth of the weights in a hundred toggles."""
    model = randomised(add_lora(tiny_llama().bfloat16(), targets=EVERYWHERE))
    before = snapshot(model)
    for _ in range(100):
        model.eval()
        model.train()
    after = snapshot(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_merged_model_is_saved_as_any_other(tiny_llama, tmp_path):
    model = merge_lora(randomised(add_lora(tiny_llama(), targets=EVERYWHERE)))
    save_hf(model, tmp_path)
    assert torch.equal(load_model(tmp_path)(TOKENS), model(TOKENS))


# ---------------------------------------------------------------------------------------------------------------------
# Files. OPTIONS are what add_lora was given, and travel in adapter_config.json.

OPTIONS = {"rank": 4, "alpha": 12, "dropout": 0.05, "rslora": False}


def make_adapter(model, path, targets=("all-linear",), **changes):
    """A trained adapter on `model`, saved to `path`."""
    options = OPTIONS | changes
    randomised(add_lora(model, targets=targets, **options)).eval()
    save_adapter(model, path, partial(to_hf, config=model.config), base_model="base", **options)
    return model


def open_adapter(model, path):
    return load_adapter(model, path, partial(from_hf, config=model.config)).eval()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", [("wq", "wv"), ("all-linear",), EVERYWHERE, ("tok_embeddings",)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_adapter_round_trip_is_exact(kv_heads, targets, rslora, tiny_llama, tmp_path):
    saved = make_adapter(tiny_llama(n_kv_heads=kv_heads), tmp_path, targets, rslora=rslora)
    loaded = open_adapter(tiny_llama(n_kv_heads=kv_heads), tmp_path)
    before, after = snapshot(saved), snapshot(loaded)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(saved(TOKENS), loaded(TOKENS))
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == set(lora_parameters(loaded))


def test_adapter_file_holds_pefts_names_and_fields(tiny_llama, tmp_path):
    make_adapter(tiny_llama(n_layers=1), tmp_path, ("wq", "w2", "tok_embeddings", "output"), rslora=True)
    prefix = "base_model.model."
    assert {name: tuple(t.shape) for name, t in load_file(tmp_path / "adapter_model.safetensors").items()} == {
        f"{prefix}model.layers.0.self_attn.q_proj.lora_A.weight": (4, 32),
        f"{prefix}model.layers.0.self_attn.q_proj.lora_B.weight": (32, 4),
        f"{prefix}model.layers.0.mlp.down_proj.lora_A.weight": (4, 56),
        f"{prefix}model.layers.0.mlp.down_proj.lora_B.weight": (32, 4),
        f"{prefix}model.embed_tokens.lora_embedding_A": (4, 96),
        f"{prefix}model.embed_tokens.lora_embedding_B": (32, 4),
        f"{prefix}lm_head.lora_A.weight": (4, 32),
        f"{prefix}lm_head.lora_B.weight": (96, 4),
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "embed_tokens", "lm_head", "q_proj"]
    expected = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "lora_dropout": 0.05, "use_rslora": True, "bias": "none"}
    assert expected.items() <= config.items()
    assert config["base_model_name_or_path"] == "base"


@pytest.mark.parametrize("name", ["adapter_linear", "adapter_wide"])
def test_an_adapter_of_peft_gives_the_logits_it_gave_there(name):
    model = load_model(GOLDEN / "model")
    golden, before = load_file(GOLDEN / "logits.safetensors"), model(TOKENS)
    close(open_adapter(model, GOLDEN / name)(TOKENS), golden[name])
    assert (before - golden[name]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["adapter_linear", "adapter_wide"])
def test_what_peft_wrote_is_what_we_write(name, tmp_path):
    """Read here, written here: every tensor as in PEFT's file, but for its copies of the frozen embedding and head."""
    model = open_adapter(load_model(GOLDEN / "model"), GOLDEN / name)
    save_adapter(model, tmp_path, partial(to_hf, config=model.config), base_model="", **OPTIONS)
    ours, theirs = load_file(tmp_path / "adapter_model.safetensors"), load_file(GOLDEN / name / "adapter_model.safetensors")
    theirs = {name: t for name, t in theirs.items() if "base_layer" not in name}
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_copies_that_peft_adds_may_be_of_another_format(dtype):
    """The adapter was trained on the base as it was loaded there. adapter_wide holds its embedding and head in fp32."""
    copies = [name for name in load_file(GOLDEN / "adapter_wide" / "adapter_model.safetensors") if "base_layer" in name]
    assert len(copies) == 2
    open_adapter(load_model(GOLDEN / "model", dtype=dtype), GOLDEN / "adapter_wide")


def test_an_adapter_in_a_bin_is_read_as_one_in_safetensors(tiny_llama, tmp_path):
    """So PEFT wrote them in its first year."""
    saved = make_adapter(tiny_llama(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    torch.save({name: tensor + 1 for name, tensor in load_file(file).items()}, file.with_suffix(".bin"))
    assert torch.equal(open_adapter(tiny_llama(), tmp_path)(TOKENS), saved(TOKENS))  # of both PEFT takes the newer kind too
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    assert torch.equal(open_adapter(tiny_llama(), tmp_path)(TOKENS), saved(TOKENS))
    cut("adapter_model.bin")(tmp_path)
    with pytest.raises(LoRAError, match=r"adapter_model.bin.*cut short"):
        open_adapter(tiny_llama(), tmp_path)


def test_row_order_of_q_and_k_matters():
    """Control: the adapter taken over without the reorder gives other logits, so the tests above see it."""
    model = load_model(GOLDEN / "model")

    def without_reorder(name, tensor):
        return from_hf(name, tensor, model.config)[0], tensor

    wrong = load_adapter(model, GOLDEN / "adapter_linear", without_reorder)(TOKENS)
    assert (wrong - load_file(GOLDEN / "logits.safetensors")["adapter_linear"]).abs().max() > 0.05


SETS = {  # our targets: PEFT's
    ("wq", "wk"): ["q_proj", "k_proj"],
    ("all-linear",): ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ("tok_embeddings",): ["embed_tokens"],
    ("output",): ["lm_head"],
    EVERYWHERE: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"],
}
every_set = pytest.mark.parametrize("targets", SETS, ids=" ".join)


def hf_base(model, path):
    """The same base model in transformers, by way of its files."""
    transformers = pytest.importorskip("transformers")
    save_hf(model, path)
    return transformers.LlamaForCausalLM.from_pretrained(path).float()


@pytest.mark.live
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rsLoRA"])
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["multi-head", "grouped-query"])
@every_set
def test_our_adapter_opens_in_peft(targets, kv_heads, rslora, tiny_llama, tmp_path):
    peft = pytest.importorskip("peft")
    base = hf_base(tiny_llama(n_kv_heads=kv_heads), tmp_path / "base")
    ours = make_adapter(tiny_llama(n_kv_heads=kv_heads), tmp_path / "adapter", targets, rslora=rslora)
    before = base(TOKENS[None]).logits[0]
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    close(theirs(TOKENS[None]).logits[0], ours(TOKENS))
    assert (before - ours(TOKENS)).abs().max() > 0.05  # control: the adapter did something


@pytest.mark.live
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rsLoRA"])
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["multi-head", "grouped-query"])
@every_set
def test_pefts_adapter_opens_here(targets, kv_heads, rslora, tiny_llama, tmp_path):
    peft = pytest.importorskip("peft")
    ours = tiny_llama(n_kv_heads=kv_heads)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules=SETS[targets], use_rslora=rslora)
    theirs = peft.get_peft_model(hf_base(ours, tmp_path / "base"), config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.15)
    theirs.save_pretrained(tmp_path / "adapter")
    before = ours(TOKENS)
    close(open_adapter(ours, tmp_path / "adapter")(TOKENS), theirs(TOKENS[None]).logits[0])
    assert (before - ours(TOKENS)).abs().max() > 0.05


VARIANTS = {  # of PEFT's LoraConfig: whether it is read
    "target_modules": (r".*\.1\.self_attn\.(q|k)_proj", True),
    "exclude_modules": (["q_proj"], True),
    "layers_to_transform": ([1], True),
    "lora_alpha": (0.5, True),
    "bias": ("all", False),
    "use_dora": (True, False),
    "lora_bias": (True, False),
    "modules_to_save": (["lm_head"], False),
    "rank_pattern": ({"q_proj": 2}, False),
    "alpha_pattern": ({"q_proj": 2}, False),
    "trainable_token_indices": ([3, 4], False),
    "layer_replication": ([[0, 1], [0, 1]], False),
    "alora_invocation_tokens": ([21, 70], False),
    "init_lora_weights": ("gaussian", True),
    "init_lora_weights orthogonal": ("orthogonal", True),
    "init_lora_weights pissa": ("pissa", False),
    "init_lora_weights olora": ("olora", False),
}


@pytest.mark.live
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_peft_gives_its_logits_or_is_refused(variant, tiny_llama, tmp_path):
    """None may be read as if it were plain: the files look alike, and the logits would be others without a word."""
    peft = pytest.importorskip("peft")
    value, read = VARIANTS[variant]
    ours = tiny_llama()
    options = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]}
    trained = peft.get_peft_model(hf_base(ours, tmp_path / "base"), peft.LoraConfig(**options | {variant.split()[0]: value}))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in trained.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.15)
    trained.save_pretrained(tmp_path / "adapter")
    if not read:
        with pytest.raises(LoRAError, match="is not plain LoRA"):
            open_adapter(ours, tmp_path / "adapter")
        return
    theirs = peft.PeftModel.from_pretrained(hf_base(ours, tmp_path / "base"), tmp_path / "adapter").eval()
    close(open_adapter(ours, tmp_path / "adapter")(TOKENS), theirs(TOKENS[None]).logits[0])


def test_what_an_adapter_of_old_leaves_out_is_what_peft_did_then(tiny_llama, tmp_path):
    saved = make_adapter(tiny_llama(), tmp_path, dropout=0.0)
    drop_field("use_rslora")(tmp_path)
    drop_field("lora_dropout")(tmp_path)
    loaded = open_adapter(tiny_llama(), tmp_path).train()
    assert torch.equal(loaded(TOKENS), saved(TOKENS))


# ---------------------------------------------------------------------------------------------------------------------
# What is broken is refused, by name


def edit_config(**changes):
    def edit(path):
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def drop_field(name):
    def edit(path):
        fields = json.loads((path / "adapter_config.json").read_text())
        del fields[name]
        (path / "adapter_config.json").write_text(json.dumps(fields))

    return edit


def edit_tensors(change):
    def edit(path):
        tensors = load_file(path / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, path / "adapter_model.safetensors")

    return edit


def cut(name, keep=0.6):
    def edit(path):
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: int(len(data) * keep)])

    return edit


Q = "base_model.model.model.layers.0.self_attn.q_proj."
BROKEN = {  # what is done to the folder: the words that the error must hold
    "config missing": (lambda p: (p / "adapter_config.json").unlink(), ["adapter_config.json", "missing"]),
    "weights missing": (lambda p: (p / "adapter_model.safetensors").unlink(), ["adapter_model.safetensors", "missing"]),
    "config cut short": (cut("adapter_config.json"), ["cut short"]),
    "config a list": (lambda p: (p / "adapter_config.json").write_text("[]"), ["adapter_config.json"]),
    "weights cut short": (cut("adapter_model.safetensors"), ["cut short"]),
    "weights empty": (cut("adapter_model.safetensors", 0), ["cut short"]),
    "no rank": (drop_field("r"), ["adapter_config.json", "r"]),
    "no alpha": (drop_field("lora_alpha"), ["adapter_config.json", "lora_alpha"]),
    "not LoRA": (edit_config(peft_type="IA3"), ["peft_type", "IA3"]),
    "not LoRA, without a rank": (
        lambda p: (edit_config(peft_type="IA3")(p), drop_field("r")(p)),
        ["peft_type", "IA3"],
    ),
    "DoRA": (edit_config(use_dora=True), ["use_dora"]),
    "bias": (edit_config(bias="all"), ["bias", "all"]),
    "whole modules": (edit_config(modules_to_save=["lm_head"]), ["modules_to_save", "lm_head"]),
    "ranks by layer": (edit_config(rank_pattern={"q_proj": 2}), ["rank_pattern"]),
    "alphas by layer": (edit_config(alpha_pattern={"q_proj": 2}), ["alpha_pattern"]),
    "weights of the base taken into A and B": (edit_config(init_lora_weights="pissa_niter_4"), ["init_lora_weights", "pissa"]),
    **{
        f"the same, by {method}": (edit_config(init_lora_weights=method), ["init_lora_weights", method])
        for method in ("olora", "corda", "LoftQ", "lora_ga")
    },
    "layers in another order": (edit_config(layer_replication=[[0, 1], [0, 1]]), ["layer_replication"]),
    "active behind some tokens only": (edit_config(alora_invocation_tokens=[21]), ["alora_invocation_tokens"]),
    "a rank in words": (edit_config(r="8"), ["adapter_config.json", "r = '8'"]),
    "a rank of nothing": (edit_config(r=0), ["adapter_config.json", "r = 0"]),
    "more than all dropped": (edit_config(lora_dropout=5), ["adapter_config.json", "lora_dropout = 5"]),
    "no share dropped": (edit_config(lora_dropout=None), ["adapter_config.json", "lora_dropout = None"]),
    "an infinite scale": (edit_config(lora_alpha=math.inf), ["adapter_config.json", "lora_alpha = inf"]),
    "NaN": (edit_tensors(lambda t: t[f"{Q}lora_B.weight"].fill_(math.nan)), ["q_proj.lora_B", "finite"]),
    "codes": (edit_tensors(lambda t: t.update({f"{Q}lora_B.weight": torch.ones(32, 4).char()})), ["q_proj.lora_B", "int8"]),
    "a head of another base": (
        edit_tensors(lambda t: t.update({"base_model.model.lm_head.base_layer.weight": torch.zeros(96, 32)})),
        ["output.base_layer", "another base model"],
    ),
    "an embedding of another size": (
        edit_tensors(lambda t: t.update({"base_model.model.model.embed_tokens.base_layer.weight": torch.ones(97, 32)})),
        ["tok_embeddings.base_layer", "another base model"],
    ),
    "a copy of what has none": (
        edit_tensors(lambda t: t.update({f"{Q}base_layer.weight": torch.ones(32, 32)})),
        ["wq.base_layer"],
    ),
    "a tensor twice, once by a name without model.": (
        edit_tensors(lambda t: t.update({"base_model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)})),
        ["layers.0.self_attn.q_proj.lora_A", "twice"],
    ),
    "Meta's names": (
        edit_tensors(lambda t: t.update({"base_model.model.layers.0.attention.wq.lora_A.weight": torch.ones(4, 32)})),
        ["layers.0.attention.wq.lora_A", "Hugging Face's name"],
    ),
    "another rank": (edit_config(r=8), ["lora_A", "(4, 32)", "(8, 32)"]),
    "A without B": (edit_tensors(lambda t: t.pop(f"{Q}lora_B.weight")), ["layers.0.attention.wq.lora_B", "missing"]),
    "no tensor at all": (edit_tensors(lambda t: t.clear()), ["adapter_model.safetensors"]),
    "another height": (
        edit_tensors(lambda t: t.update({f"{Q}lora_B.weight": torch.ones(44, 4)})),
        ["layers.0.self_attn.q_proj.lora_B", "(44, 4)"],
    ),
    "unknown module": (
        edit_tensors(lambda t: t.update({"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)})),
        ["layers.7.attention.wq"],
    ),
    "module that is no linear": (
        edit_tensors(lambda t: t.update({"base_model.model.model.norm.lora_A.weight": torch.ones(4, 32)})),
        ["norm"],
    ),
    "magnitudes of DoRA": (
        edit_tensors(lambda t: t.update({f"{Q}lora_magnitude_vector": torch.ones(32)})),
        ["layers.0.self_attn.q_proj.lora_magnitude_vector"],
    ),
    "whole embedding": (
        edit_tensors(lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(96, 32)})),
        ["model.embed_tokens is not plain LoRA"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_adapter_is_refused(name, tiny_llama, tmp_path):
    damage, words = BROKEN[name]
    make_adapter(tiny_llama(), tmp_path)
    damage(tmp_path)
    with pytest.raises(LoRAError) as error:
        open_adapter(tiny_llama(), tmp_path)
    for word in words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


@pytest.mark.parametrize("other", [{"dim": 64}, {"dim": 24}, {"dim": 40}, {"hidden_dim": 48}, {"n_layers": 1}, {"n_kv_heads": 1}])
def test_adapter_of_another_base_model_is_refused(other, tiny_llama, tmp_path):
    make_adapter(tiny_llama(), tmp_path)
    with pytest.raises(LoRAError, match=r"the adapter in .* \S*layers\.\d"):
        open_adapter(tiny_llama(**other), tmp_path)


def test_absent_adapter_is_refused(tiny_llama, tmp_path):
    with pytest.raises(LoRAError, match=r"nowhere.*adapter_config.json is missing"):
        open_adapter(tiny_llama(), tmp_path / "nowhere")


def test_other_users_may_read_what_is_saved_if_they_may_read_other_files(tiny_llama, tmp_path):
    """safetensors makes files for their owner alone; a server often runs as another user."""
    model = tiny_llama()
    save_hf(model, tmp_path / "model")
    make_adapter(model, tmp_path / "run")
    (tmp_path / "any").touch()
    for file in (tmp_path / "model" / "model.safetensors", tmp_path / "run" / "adapter_model.safetensors"):
        assert file.stat().st_mode == (tmp_path / "any").stat().st_mode
