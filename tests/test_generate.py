"""Generation: the tokens are the right ones, the text is whole characters and ends where it should, a run's settings hold."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import load
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter

import generate as generate_module
from data import TEMPLATES, DataError, Template, encode_dialog
from generate import (
    TINY,
    GenerateConfig,
    Sampling,
    answers,
    compile_decoding,
    generate,
    generate_batch,
    pick_device,
    pick_dtype,
    sample,
    text_stream,
)
from lora import LoRAError, add_lora, load_adapter
from model import PRESETS, CheckpointError, Llama, ModelConfig, RMSNorm, from_hf, load_model, random_model, read_config, save_hf
from quant import Int8Linear, NF4Linear
from talking import cpu, voices
from talking.cpu import CPUNF4, CPULinear, CPUNorm, order_for_cpu, outgrows_cache
from talking.latency import measure
from talking.voices import load_voices
from weights.bitsandbytes import reordered as reordered_rows
from weights.chat import write_chat_template

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
PROMPT = [1, 17, 4, 93, 58, 21]


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def say(model, prompt, n: int, stop_tokens=(), **how) -> list[int]:
    return list(generate(model, prompt, Sampling(max_new_tokens=n, **how), stop_tokens=stop_tokens))


def test_greedy_decoding_continues_as_transformers_did():
    expected = json.loads((GOLDEN / "greedy.json").read_text())
    model = load_model(GOLDEN / "model")
    assert len(expected["tokens"]) == 64
    assert say(model, expected["prompt"], 64) == expected["tokens"]


@pytest.mark.live
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_greedy_decoding_equals_transformers(tiny_llama, tmp_path, seed):
    transformers = pytest.importorskip("transformers")
    model = tiny_llama(seed)
    save_hf(model, tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=64, eos_token_id=None, pad_token_id=0
    )
    assert say(model, PROMPT, 64) == theirs[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "textbook"])
def test_the_cache_changes_no_token(tiny_llama, attention):
    """Each token is also chosen by a full pass over all before it. A model that always says the same would prove nothing."""
    model = tiny_llama(attention=attention)
    tokens = say(model, PROMPT, 40)
    with torch.no_grad():
        for n, token in enumerate(tokens):
            assert token == int(model(torch.tensor(PROMPT + tokens[:n]))[-1].argmax())
    assert len(set(tokens)) > 10


def test_generate_stops_after_max_new_tokens_and_before_a_stop_id(tiny_llama):
    model = tiny_llama()
    tokens = say(model, PROMPT, 20)
    assert [say(model, PROMPT, n) for n in (1, 7)] == [tokens[:1], tokens[:7]]
    stop = tokens[9]
    assert say(model, PROMPT, 20, stop_tokens=(95, stop)) == tokens[: tokens.index(stop)]
    assert say(model, PROMPT, 20, stop_tokens=(tokens[0],)) == []


def test_an_answer_ends_at_the_window_and_a_prompt_that_fills_it_is_refused(tiny_llama):
    model = tiny_llama(max_seq_len=len(PROMPT) + 3)
    assert len(say(model, PROMPT, 100)) == 3
    assert len(say(model, [*PROMPT, 5, 5], 100)) == 1
    with pytest.raises(DataError, match=r"the prompt has 9 tokens and the model's window 9: nothing is left for an answer"):
        next(generate(model, [*PROMPT, 5, 5, 5], Sampling(max_new_tokens=1)))


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(tiny_llama):
    model = tiny_llama()

    def ask(seed):
        return say(model, PROMPT, 30, temperature=1.5, seed=seed)

    assert ask(1) == ask(1)
    assert ask(1) != ask(2)


def together(model, prompts, n: int, **how) -> list[list[int]]:
    said = [[] for _ in prompts]
    for index, token in generate_batch(model, prompts, Sampling(max_new_tokens=n, **how)):
        said[index].append(token)
    return said


PROMPTS = [PROMPT, [1, 5], [7] * 21, [1, 80, 3, 3, 64, 9, 2, 71, 33], [40]]


@pytest.mark.parametrize("how", [{}, {"temperature": 1.3}, {"temperature": 1.3, "top_p": 0.9, "repetition_penalty": 1.2}])
@pytest.mark.parametrize("attention", ["sdpa", "textbook"])
def test_what_a_sequence_says_does_not_depend_on_the_others(tiny_llama, attention, how):
    """Sequence i beside four others says what it says beside empty talk, and sequence 0 what it says alone."""
    model = tiny_llama(attention=attention)
    said = together(model, PROMPTS, 40, **how)
    assert said[0] == say(model, PROMPT, 40, **how)
    for index, prompt in enumerate(PROMPTS):
        assert together(model, [[9]] * index + [prompt], 40, **how)[index] == said[index]
    assert together(model, PROMPTS[:3], 40, **how) == said[:3]
    assert len(set(map(tuple, said))) == len(PROMPTS)


def test_of_the_same_prompt_many_times_each_answer_is_drawn_anew(tiny_llama):
    model = tiny_llama()
    said = together(model, [PROMPT] * 4, 20, temperature=1.5)
    assert len(set(map(tuple, said))) == 4
    assert together(model, [PROMPT] * 4, 20, temperature=1.5, seed=1)[0] != said[0]
    assert len(set(map(tuple, together(model, [PROMPT] * 4, 20)))) == 1  # greedy: all the same
    model.output.weight.data.zero_()  # all tokens alike: a new draw for each, and there are 96
    assert len(set(say(model, PROMPT, 40, temperature=1.0))) > 20


def test_a_sequence_that_ends_leaves_and_the_others_go_on(tiny_llama):
    model = tiny_llama(max_seq_len=len(PROMPTS[2]) + 9)  # ends one at the window
    whole = [say(model, prompt, 20) for prompt in PROMPTS]
    assert len(whole[2]) == 9 and len(whole[0]) == 20
    assert together(model, PROMPTS, 20) == whole
    stop, finished, said = whole[0][5], set(), [[] for _ in PROMPTS]
    for index, token in generate_batch(model, PROMPTS, Sampling(max_new_tokens=20), stop_tokens=(stop,), finished=finished):
        said[index].append(token)
        if index == 3 and len(said[3]) == 2:
            finished.add(3)  # the caller has read enough
    for index, tokens in enumerate(said):
        expected = whole[index][: whole[index].index(stop)] if stop in whole[index] else whole[index]
        assert tokens == (expected[:2] if index == 3 else expected)
    assert finished == set(range(5))


def test_where_sequences_leave_the_others_keep_their_own_draws_and_penalties(tiny_llama):
    """Two leave at once, the last among them; a third while its next token is made already."""
    model, how = tiny_llama(), {"temperature": 1.3, "repetition_penalty": 1.5}
    whole, finished, said = together(model, PROMPTS, 20, **how), set(), [[] for _ in PROMPTS]
    for index, token in generate_batch(model, PROMPTS, Sampling(max_new_tokens=20, **how), finished=finished):
        said[index].append(token)
        if index in (1, 4) and len(said[index]) == 3:
            finished.add(index)
        if index == 0 and len(said[0]) == 8:
            finished.add(2)
    assert said == [tokens[:n] for tokens, n in zip(whole, (20, 3, 7, 20, 3), strict=True)]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_chat_reads_only_what_is_new_and_says_what_it_would_have_said(tiny_llama, monkeypatch, compiled):
    """Its answers are stopped, its last question is changed once, its cache grows, and others are answered in between."""
    model, read, forward = tiny_llama(max_seq_len=600), [], Llama.forward

    def counting(self, tokens, *args, **how):
        read.append(len(tokens))
        return forward(self, tokens, *args, **how)

    monkeypatch.setattr(Llama, "forward", counting)
    if compiled:
        monkeypatch.setattr(torch, "compile", lambda step, **_: step)
        compile_decoding(model)
    history, known, sampling = [*PROMPTS[2]], 0, Sampling(max_new_tokens=12, temperature=1.0)
    for turn in range(6):
        alone = list(generate(tiny_llama(max_seq_len=600), history, sampling))
        read.clear()
        said = [token for _, token in zip(range(12 - turn), generate(model, history, sampling, keep=True), strict=False)]
        assert said == alone[: 12 - turn] and read == [len(history) - known] + [1] * (len(said) - 1)
        known = len(history) + len(said) - 1  # the last that was said was not read
        history = [*history, *said, *range(3, 90)]
        if turn == 2:
            known -= len(said) + 4
            history = [*history[:known], *range(90, 60, -1)]
        if turn == 4:
            assert together(model, PROMPTS, 5) == [say(tiny_llama(max_seq_len=600), prompt, 5) for prompt in PROMPTS]
            known = 0


def test_the_same_question_again_is_answered_the_same_in_bf16_too(tiny_llama, monkeypatch):
    """Of a prompt that was read already the last token alone was once read again, as in decoding, whose attention is in fp32.
    Products are made a row at a time here: how many rows there are would round otherwise on some machines."""
    rows = lambda self, x: torch.cat([nn.functional.linear(row[None], self.weight) for row in x])  # noqa: E731
    monkeypatch.setattr(nn.Linear, "forward", rows)
    model = tiny_llama(dim=64, hidden_dim=160).bfloat16()
    for seed in range(8):
        how = Sampling(max_new_tokens=40, temperature=1.0, seed=seed)
        first = list(generate(model, PROMPTS[3], how))
        assert [list(generate(model, PROMPTS[3], how, keep=True)) for _ in range(3)] == [first] * 3


@pytest.mark.parametrize("how", [{}, {"temperature": 1.3, "top_p": 0.9, "repetition_penalty": 1.2}])
def test_compiled_decoding_says_the_same_from_one_graph_whatever_the_lengths(tiny_llama, monkeypatch, how):
    """The whole step is captured, sampling included, once for all answers to as many prompts: nothing is compiled again."""
    model, counter = tiny_llama(max_seq_len=300), CompileCounter()
    plain = [together(model, PROMPTS[:3], n, **how) for n in (40, 9)]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch.compiler.reset()
    compile_decoding(model)
    assert [together(model, PROMPTS[:3], n, **how) for n in (40, 9)] == plain
    cache, _ = model.free_cache
    stop, finished = plain[0][0][5], set()
    for index, token in generate_batch(model, PROMPTS[:3], Sampling(max_new_tokens=40, **how), stop_tokens=(stop,)):
        finished.add((index, token))
    assert all(token != stop for _, token in finished) and model.free_cache[0] is cache
    next(answers := generate_batch(model, PROMPTS[:3], Sampling(**how)))
    next(generate_batch(model, PROMPTS[:3], Sampling(**how)))  # at the same time: a cache of its own
    assert counter.frame_count == 1
    answers.close()


def test_a_compiled_step_writes_into_nothing_but_the_cache(tiny_llama, monkeypatch):
    """torch.compile makes no CUDA graph of a step that writes into another tensor than those of a known address, and runs it
    kernel by kernel instead. The step once noted its token in `seen`, which is a new tensor in every answer."""
    written = set()

    def watched(graph, _):
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]

        def run(*tensors):
            before = [tensor._version for tensor in tensors]
            out = graph(*tensors)
            for node, tensor, version in zip(inputs, tensors, before, strict=True):
                if tensor._version != version:
                    written.add(node.meta["tensor_dict"].get("_dynamo_static_input_type"))
            return out

        return run

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=watched))
    torch.compiler.reset()
    said = together(compile_decoding(tiny_llama()), PROMPTS[:3], 5, temperature=1.3, top_p=0.9, repetition_penalty=1.2)
    assert len(said) == 3 and written == {"unguarded"}


def test_compiled_decoding_is_not_compiled_again_for_other_numbers_of_the_same_settings(tiny_llama, monkeypatch):
    """torch.compile makes eight of a function and then runs it uncompiled: so many moves of a slider would have been all."""
    model, counter = tiny_llama(), CompileCounter()
    hows = [
        {"temperature": 0.5 + n / 4, "top_p": 0.95 - n / 20, "min_p": n / 100, "repetition_penalty": 1.05 + n / 10}
        for n in range(1, 12)
    ]
    plain = [together(model, PROMPTS[:2], 8, **how) for how in hows]
    assert len({str(said) for said in plain}) > 6
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch.compiler.reset()
    compile_decoding(model)
    assert [together(model, PROMPTS[:2], 8, **how) for how in hows] == plain
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", [NF4Linear, Int8Linear, None])
def test_compiled_decoding_is_one_graph_with_quantised_weights_and_adapters_too(monkeypatch, kind):
    torch.manual_seed(0)
    sizes = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=128, vocab_size=96)
    model = random_model(sizes, device="cpu", dtype=torch.float32, quantize=kind)
    model, counter = model if kind else add_lora(model), CompileCounter()
    plain = together(model, PROMPTS[:3], 12)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch.compiler.reset()
    assert together(compile_decoding(model), PROMPTS[:3], 12) == plain
    assert counter.frame_count == 1


def test_bf16_weights_laid_out_for_a_cpu_say_the_same_up_to_rounding(tiny_llama):
    model = tiny_llama(dim=64, hidden_dim=160, vocab_size=340).bfloat16()
    if not CPULinear.helps(torch.device("cpu"), torch.bfloat16):
        pytest.skip("this CPU, or its PyTorch, has no bf16 products of its own")
    tokens = torch.tensor(PROMPTS[3])
    with torch.no_grad():
        before, said = model(tokens), say(model, PROMPT, 4)
        kept = {name: weight.clone() for name, weight in model.named_parameters()}
        order_for_cpu(model)
        assert (model(tokens) - before).abs().max() < 0.05 * before.abs().max()
        assert type(model.output) is type(model.layers[0].feed_forward.w2) is CPULinear
        assert all(torch.equal(model.get_parameter(name).to_dense(), weight) for name, weight in kept.items() if weight.dim() > 1)
    assert say(model, PROMPT, 4) == said
    assert not CPULinear.helps(torch.device("cpu"), torch.float32)


@pytest.mark.live
@pytest.mark.parametrize("columns", [320, 16448])  # handed over at once, and in three pieces
def test_an_nf4_weight_handed_to_bitsandbytes_multiplies_the_same_a_row_at_a_time(columns):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear, x = NF4Linear(torch.randn(96, columns)), torch.randn(40, columns).bfloat16()
    if not CPUNF4.helps(linear, torch.bfloat16):
        pytest.skip("this CPU has no AVX-512 for bf16")
    assert not CPUNF4.helps(linear, torch.float32) and not CPUNF4.helps(NF4Linear(torch.randn(72, 320)), torch.bfloat16)
    exact = x.double() @ linear.dequantize(torch.float32).double().T
    reordered = NF4Linear(reordered_rows(linear.packed(), torch.arange(95, -1, -1)))  # its scales are of finer blocks
    assert reordered.packed().nested_block < 256
    handed, memory = CPUNF4(linear), linear.weight.data_ptr()
    assert sum(weight.nbytes for weight in handed.parameters()) == 96 * columns / 2
    assert [weight.data_ptr() for weight in handed.parameters()] == [memory]  # in the same place: nothing is there twice
    with torch.no_grad():
        out = handed(x)
        assert (out - exact).norm() < 0.005 * exact.norm()  # bf16 rounds the result, and here the scales
        assert torch.equal(out, torch.cat([handed(row[None]) for row in x]))
        assert torch.equal(out, handed(x.T.contiguous().T))  # laid out by columns
        assert torch.equal(CPUNF4(reordered)(x), out.flip(-1))


@pytest.mark.live
def test_a_model_in_nf4_answers_through_bitsandbytes_as_without(base, tiny_llama, request, monkeypatch):
    pytest.importorskip("bitsandbytes")
    if cpu.bitsandbytes() is None:
        pytest.skip("this CPU has no AVX-512 for bf16")
    save_hf(tiny_llama(vocab_size=340, dim=64, hidden_dim=160), base)
    how = config(model=base, adapter=request.getfixturevalue("adapter"), dtype="bf16", quantize="nf4", compare=True)
    through = [voice.model for voice in load_voices(how)]
    monkeypatch.setattr(cpu, "bitsandbytes", lambda: None)
    without = [voice.model for voice in load_voices(how)]
    tokens, logits = torch.tensor(PROMPTS[3]), []
    with torch.no_grad():
        for ours, plain in zip(through, without, strict=True):
            handed = {name for name, module in ours.named_modules() if isinstance(module, CPUNF4)}
            packed = {name for name, module in plain.named_modules() if isinstance(module, NF4Linear)}
            assert handed and handed == {name for name in packed if plain.get_submodule(name).in_features % 64 == 0}
            logits.append(plain(tokens))
            assert (ours(tokens) - logits[-1]).abs().max() < 0.05 * logits[-1].abs().max()
    assert (logits[0] - logits[1]).abs().max() > 0.2 * logits[0].abs().max()  # the adapter speaks
    assert through[0].layers[0].attention.wq.product.weight is through[1].layers[0].attention.wq.base.product.weight


@pytest.mark.live
def test_the_latency_of_weights_handed_to_bitsandbytes_is_that_of_nf4(base, tiny_llama, monkeypatch):
    """Their class is another; the table once said bf16, without quantisation."""
    pytest.importorskip("bitsandbytes")
    if cpu.bitsandbytes() is None:
        pytest.skip("this CPU has no AVX-512 for bf16")
    monkeypatch.setattr("talking.latency.RUNS", 1)
    monkeypatch.setattr("talking.latency.copy_bandwidth", lambda device: 1e9)
    save_hf(tiny_llama(vocab_size=340, dim=64, hidden_dim=128), base)
    lines = []
    for dtype in ("bf16", "fp32"):  # handed over, and not
        model, tokenizer, template = load(config(model=base, dtype=dtype, quantize="nf4"))
        lines.append(measure(model, tokenizer, template, "Where?"))
    assert [line["quantize"] for line in lines] == ["nf4", "nf4"]
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert lines[0]["weights_bytes"] == weights * 4.25 / 8 + 2 * (340 * 64 + 5 * 64)  # a scale of 16 bits for 64 codes


@pytest.mark.parametrize("broken", [ImportError, OSError, RuntimeError, AttributeError])
def test_a_bitsandbytes_that_cannot_be_imported_is_done_without(monkeypatch, broken):
    """Made for another PyTorch or another machine it raises what it likes."""

    class Broken:
        def find_spec(self, name, *_):
            if name == "bitsandbytes":
                raise broken("no")

    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert cpu.bitsandbytes.__wrapped__() is None


def test_a_cpu_answers_in_bf16_where_weights_outgrow_its_cache_and_nothing_else_is_asked(base, tmp_path, monkeypatch):
    assert [outgrows_cache(size) for size in (read_config(TINY), PRESETS["125m"], PRESETS["1b"])] == [False, True, True]
    asked = [{}, {"dtype": "fp32"}, {"merge": tmp_path / "out"}, {"save": tmp_path / "out"}]
    assert {load(config(model=base, **how))[0].norm.weight.dtype for how in asked} == {torch.float32}
    monkeypatch.setattr(voices, "outgrows_cache", lambda config: True)
    dtypes = [load(config(model=base, **how))[0].norm.weight.dtype for how in asked]
    fast = torch.bfloat16 if CPULinear.helps(torch.device("cpu"), torch.bfloat16) else torch.float32
    assert dtypes == [fast] + [torch.float32] * 3


def test_where_pytorch_has_no_onednn_answers_are_in_fp32_and_no_traceback(base, monkeypatch):
    """As on a Mac: its PyTorch lacks the operators that a bf16 product is asked of, and that of whether there is one."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", type("Empty", (), {})())
    monkeypatch.setattr(voices, "outgrows_cache", lambda config: True)
    assert load(config(model=base))[0].norm.weight.dtype == torch.float32
    assert load(config(model=base, dtype="bf16"))[0].norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpus_norm_is_rmsnorm_a_row_at_a_time(dtype):
    torch.manual_seed(0)
    norm = RMSNorm(768, 1e-2).to(dtype)  # an eps that is seen
    norm.weight.data.uniform_(0.5, 1.5)
    x = torch.randn(9, 768, dtype=dtype) * torch.tensor([[0.01]] + [[3.0]] * 8, dtype=dtype)
    ordered = order_for_cpu(nn.Sequential(norm))[0]
    assert type(ordered) is CPUNorm and ordered.weight is norm.weight
    with torch.no_grad():
        out, exact = ordered(x), norm.double()(x.double())
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert torch.equal(out, torch.cat([ordered(row[None]) for row in x]))


def test_a_bf16_model_is_read_in_a_cpus_order_to_answer_and_in_plain_rows_to_be_saved(base, tmp_path):
    if not CPULinear.helps(torch.device("cpu"), torch.bfloat16):
        pytest.skip("this CPU, or its PyTorch, has no bf16 products of its own")
    model = load(config(model=base, dtype="bf16"))[0]
    plain = load(GenerateConfig(model=str(base), device="cpu", dtype="bf16", save=str(tmp_path / "saved")))[0]
    assert {type(module) for module in plain.modules()}.isdisjoint({CPULinear})
    assert sum(type(module) is CPULinear for module in model.modules()) == 2 * 7 + 1
    for name, weight in plain.named_parameters():
        assert torch.equal(model.get_parameter(name).to_dense(), weight)


def test_of_several_prompts_one_that_is_empty_or_fills_the_window_is_refused(tiny_llama):
    model = tiny_llama(max_seq_len=9)
    for prompt, said in (([], "the prompt has no tokens"), ([5] * 9, "the prompt has 9 tokens and the model's window 9")):
        with pytest.raises(DataError, match=said):
            next(generate_batch(model, [PROMPT, prompt], Sampling()))


def test_between_two_tokens_gradients_are_as_they_were(tiny_llama):
    """train.py asks for answers in the middle of training: inference mode must not outlive the step that makes a token."""
    tokens = generate(tiny_llama(), PROMPT, Sampling(max_new_tokens=3))
    next(tokens)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


# ---------------------------------------------------------------------------------------------------------------------
# Choosing

# The probabilities are 0.4, 0.3, 0.15, 0.1, 0.05, in an order that is not theirs.
PROBS = torch.tensor([0.15, 0.4, 0.05, 0.3, 0.1])


def draw(n: int, temperature=1.0, logits=None, **how) -> Counter:
    logits = PROBS.log() + 3 if logits is None else logits  # a constant changes no probability
    draws = 1 - torch.rand(n, generator=torch.Generator().manual_seed(0))
    return Counter(sample(logits.expand(n, -1), Sampling(temperature=temperature, **how), draws).tolist())


def assert_drawn_from(counts: Counter, probs: torch.Tensor):
    """Frequencies within four standard deviations. The seed is fixed: a pass now is a pass always."""
    n = counts.total()
    for token, p in enumerate(probs.tolist()):
        assert abs(counts[token] - n * p) <= 4 * (n * p * (1 - p)) ** 0.5, (token, p, counts)


def test_temperature_0_is_the_likeliest_token():
    assert draw(20, temperature=0) == {1: 20}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature):
    expected = PROBS ** (1 / temperature)
    assert_drawn_from(draw(4000, temperature), expected / expected.sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_logits_in_16_bits_the_same_tokens_are_drawn_as_of_the_same_in_fp32(dtype):
    """Thousands of small probabilities summed in 16 bits do not come to 1: late tokens would never be drawn."""
    logits, draws = torch.randn(1, 4000).to(dtype).expand(500, -1), torch.linspace(1e-3, 1, 500)
    how = Sampling(temperature=1.0)
    assert torch.equal(sample(logits, how, draws), sample(logits.float(), how, draws))


@pytest.mark.parametrize(("k", "kept"), [(1, [1]), (2, [1, 3]), (4, [0, 1, 3, 4]), (9, [0, 1, 2, 3, 4])])
def test_top_k_keeps_the_k_likeliest_in_proportion(k, kept):
    expected = torch.zeros(5)
    expected[kept] = PROBS[kept] / PROBS[kept].sum()
    assert_drawn_from(draw(3000, top_k=k), expected)


@pytest.mark.parametrize(
    ("p", "kept"), [(1e-9, [1]), (0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [0, 1, 3]), (0.96, [0, 1, 2, 3, 4])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p_in_proportion(p, kept):
    expected = torch.zeros(5)
    expected[kept] = PROBS[kept] / PROBS[kept].sum()
    assert_drawn_from(draw(3000, top_p=p), expected)


def test_top_p_counts_within_what_top_k_left():
    """Of 0.4, 0.3, 0.15 the first two are 0.82: with p 0.8 the third goes, though 0.7 of all would not have reached 0.8."""
    assert set(draw(300, top_k=3, top_p=0.8)) == {1, 3}
    assert set(draw(300, top_k=3, top_p=0.83)) == {0, 1, 3}


def test_top_p_supports_equal_the_definition_on_random_logits():
    for seed in range(5):
        logits = torch.randn(12, generator=torch.Generator().manual_seed(seed)) * 2
        probs = logits.softmax(0).tolist()
        kept, mass = set(), 0.0
        for token in sorted(range(12), key=lambda i: -probs[i]):
            if mass < 0.7:
                kept.add(token)
            mass += probs[token]
        assert set(draw(1000, top_p=0.7, logits=logits)) == kept


@pytest.mark.parametrize(("p", "kept"), [(0.124, range(5)), (0.126, [0, 1, 3, 4]), (0.374, [0, 1, 3]), (0.76, [1]), (1, [1])])
def test_min_p_keeps_what_has_that_share_of_the_likeliest_ones_probability(p, kept):
    """0.4 is the largest: 0.05 stays up to a min-p of 0.125, 0.1 up to 0.25, 0.15 up to 0.375, 0.3 up to 0.75."""
    expected = torch.zeros(5)
    expected[list(kept)] = PROBS[list(kept)] / PROBS[list(kept)].sum()
    assert_drawn_from(draw(3000, min_p=p), expected)


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_what_was_there():
    logits, seen = torch.tensor([2.0, -1.0, 1.5, -2.0]), torch.tensor([True, True, False, False])
    expected = torch.tensor([2 / 1.6, -1 * 1.6, 1.5, -2.0]).softmax(0)
    draws = 1 - torch.rand(4000, generator=torch.Generator().manual_seed(0))
    how = Sampling(temperature=1, repetition_penalty=1.6)
    assert_drawn_from(Counter(sample(logits.expand(4000, -1), how, draws, seen.expand(4000, -1)).tolist()), expected)
    greedy = Sampling(repetition_penalty=1.6)
    assert sample(logits[None], greedy, draws[:1], seen[None]).tolist() == [2]
    assert sample(logits[None], greedy, draws[:1], ~seen[None]).tolist() == [0]
    assert sample(logits[None], Sampling(repetition_penalty=0.5), draws[:1], ~seen[None]).tolist() == [2]  # made likelier


def test_the_prompts_tokens_count_as_having_been_there(tiny_llama):
    """With a penalty beyond measure a token comes again only when all have been there."""
    tokens = say(tiny_llama(), PROMPT, 40, repetition_penalty=1e9)
    assert len(set(tokens) | set(PROMPT)) == 46


@pytest.mark.live
@pytest.mark.parametrize("seed", range(6))
def test_the_rules_together_keep_what_transformers_keeps(seed):
    """Its logits processors in its order; all of a fine comb of draws, so that every token that can be drawn is."""
    theirs = pytest.importorskip("transformers.generation.logits_process")

    generator = torch.Generator().manual_seed(seed)
    logits, prompt = torch.randn(1, 50, generator=generator) * 3, torch.randint(0, 50, (1, 12), generator=generator)
    how = {"temperature": 0.8, "top_k": [0, 20][seed % 2], "top_p": [0.9, 1.0, 0.8][seed % 3], "min_p": [0, 0.02][seed // 3]}
    scores = theirs.RepetitionPenaltyLogitsProcessor(1.3)(prompt, logits)
    scores = theirs.TemperatureLogitsWarper(how["temperature"])(prompt, scores)
    scores = theirs.TopKLogitsWarper(how["top_k"])(prompt, scores) if how["top_k"] else scores
    scores = theirs.TopPLogitsWarper(how["top_p"])(prompt, scores)
    scores = theirs.MinPLogitsWarper(how["min_p"])(prompt, scores) if how["min_p"] else scores
    seen = torch.zeros(1, 50, dtype=torch.bool)
    seen[0, prompt[0]] = True
    n = 200_000
    comb = (torch.arange(n) + 1) / n
    drawn = sample(logits.expand(n, -1), Sampling(repetition_penalty=1.3, **how), comb, seen.expand(n, -1))
    assert torch.allclose(drawn.bincount(minlength=50) / n, scores.softmax(-1)[0], atol=2e-5)


@pytest.mark.parametrize(
    "how", [{"temperature": 1e-320}, {"temperature": 1e-39, "top_p": 0.5}, {"temperature": 1e-39, "top_k": 3}]
)
def test_a_temperature_next_to_0_takes_the_likeliest_token(how):
    """Divided by it in fp32, all logits once were infinite, and the token was one that the model does not have."""
    assert draw(20, **how) == {1: 20}


@pytest.mark.parametrize("penalty", [1e-300, 1e300])
def test_a_penalty_beyond_fp32_orders_tokens_as_one_within(penalty):
    logits, seen = torch.tensor([[3.0, 2.0, 0.0, -1.0]]), torch.tensor([[True, True, True, True]])
    for how in (Sampling(repetition_penalty=penalty), Sampling(repetition_penalty=penalty, temperature=1.0)):
        assert sample(logits, how, torch.tensor([0.1]), seen).tolist() == [0]


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.0, "top_k": 2}])
def test_a_model_that_predicts_nan_says_so_instead_of_an_answer(tiny_llama, how):
    """As fp16 does where a number runs over. Token 0 was answered for ever, or one that the model does not have."""
    model = tiny_llama()
    model.layers[1].feed_forward.w2.weight.data[5] = torch.inf
    with pytest.raises(DataError, match="the model predicts NaN: a weight is broken, or numbers ran over"):
        together(model, PROMPTS, 3, **how)


def test_no_token_of_probability_0_is_drawn_at_either_end_of_the_line():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for draw, token in ((1e-38, 1), (2**-25, 1), (0.5, 1), (0.5001, 3), (1.0, 3)):
        assert sample(logits, Sampling(temperature=1), torch.tensor([draw])).tolist() == [token]


# ---------------------------------------------------------------------------------------------------------------------
# Text


def as_bytes(text: str) -> list[int]:
    """Text as byte pieces alone, one token a byte: the pieces <0x00> to <0xFF> follow the three special ones."""
    return [3 + byte for byte in text.encode()]


TEXT = "I said: 🙂, 👩‍👩‍👧!\n\n日本 ok é\t end "


@pytest.mark.parametrize("way", ["pieces", "bytes"])
def test_streamed_text_is_the_whole_text_and_never_half_a_character(tokenizer, way):
    ids = as_bytes(TEXT) if way == "bytes" else tokenizer.encode(TEXT)
    parts = list(text_stream(tokenizer, iter(ids)))
    assert "".join(parts) == TEXT
    assert not any("\ufffd" in part for part in parts)
    assert len(parts) > 20  # it does stream


def test_text_is_written_as_soon_as_its_character_is_whole(tokenizer):
    ids, fed = as_bytes("a🙂b"), []
    written = text_stream(tokenizer, (fed.append(i) or i for i in ids))
    assert [(next(written), len(fed)) for _ in range(3)] == [("a", 1), ("🙂", 5), ("b", 6)]


@pytest.mark.parametrize("n", range(1, 5))
def test_an_answer_cut_inside_a_character_ends_before_it(tokenizer, n):
    assert "".join(text_stream(tokenizer, iter(as_bytes("ab🙂")[: 2 + n]))) == ("ab" if n < 4 else "ab🙂")


def test_bytes_that_are_no_character_are_shown_as_such_and_stop_nothing(tokenizer):
    parts = list(text_stream(tokenizer, iter([*as_bytes("a"), 3 + 0xFF, *as_bytes("b")])))
    assert "".join(parts) == "a\ufffdb"


@pytest.mark.parametrize("way", ["pieces", "bytes"])
@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("Yes.\n\n### Instruction:\nMore", ("### Instruction:",), "Yes.\n\n"),
        ("Yes.### Instruction:", ("### Instruction:",), "Yes."),
        ("### Instruction: Yes.", ("### Instruction:",), ""),
        ("A ### B #### Instruction: C", ("### Instruction:",), "A ### B #"),  # false starts are text
        ("A ### Instr", ("### Instruction:",), "A ### Instr"),  # so is a start that the stream ends on
        ("one two three", ("three", "two"), "one "),  # the first to appear, not the first named
        ("an instruction", ("ion", "ruct"), "an inst"),  # one token may complete both
        ("日本🙂本", ("🙂",), "日本"),
        ("so: 日🙂", ("日🙂", ": 本"), "so: "),  # its beginning is held back while the next character is not whole
        ("so: 日本🙂", ("日🙂",), "so: 日本🙂"),
        ("aaab", ("aab",), "a"),
        ("no stop here", (), "no stop here"),
    ],
)
def test_text_ends_before_a_stop_string_however_the_tokens_cut_it(tokenizer, way, text, stop, shown):
    ids = as_bytes(text) if way == "bytes" else tokenizer.encode(text)
    assert "".join(text_stream(tokenizer, iter(ids), stop)) == shown


def test_nothing_is_generated_after_a_stop_string(tokenizer):
    ids, fed = as_bytes("Yes.###" + "x" * 50), []
    list(text_stream(tokenizer, (fed.append(i) or i for i in ids), ("###",)))
    assert len(fed) == len("Yes.###")


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_question_is_asked_as_the_model_was_trained_and_the_reply_written_as_it_is(tokenizer, monkeypatch, template):
    """The model is stood in for by one that replies exactly what training would have it reply."""
    reply = "  def f():\n\treturn 1\n"
    dialog = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Code?"}]
    trained, _ = encode_dialog([*dialog, {"role": "assistant", "content": reply}], tokenizer, TEMPLATES[template])

    def stand_in(model, prompts, sampling, *, stop_tokens, **_):
        assert trained[: len(prompts[0])] == prompts[0]
        assert (sampling, stop_tokens) == (Sampling(max_new_tokens=9), (2,))
        yield from ((0, token) for token in trained[len(prompts[0]) :] if token not in stop_tokens)

    monkeypatch.setattr(generate_module, "generate_batch", stand_in)
    asked, _ = encode_dialog(dialog, tokenizer, TEMPLATES[template])
    ((text, count),) = answers(None, tokenizer, TEMPLATES[template], [asked], Sampling(max_new_tokens=9))
    assert text == reply.strip() and count == len(trained) - len(asked) - 1


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def config(**flags) -> GenerateConfig:
    flags = {name: (str(value),) if name == "adapter" else str(value) for name, value in flags.items()}
    return GenerateConfig(**{"device": "cpu", **flags})


def test_the_folder_of_a_full_run_knows_its_tokenizer_and_template(base):
    assert load(config(model=base))[2] == TEMPLATES["llama2"]
    (base / "run.json").write_text('{"template": "alpaca"}')
    model, tokenizer, template = load(config(model=base))
    assert template == TEMPLATES["alpaca"]
    assert tokenizer.vocab_size == model.config.vocab_size == 340
    assert not model.training
    assert load(config(model=base, template="plain"))[2] == TEMPLATES["plain"]


def test_the_folder_of_a_lora_run_knows_its_base_tokenizer_and_template(base, adapter):
    model, _, template = load(config(adapter=adapter))
    expected = load_adapter(load_model(base), adapter, partial(from_hf, config=model.config))
    tokens = torch.tensor(PROMPT)
    torch.testing.assert_close(model(tokens), expected(tokens))
    assert not torch.allclose(model(tokens), load_model(base)(tokens), atol=0.1)  # the control: the adapter does something
    assert template == TEMPLATES["alpaca"]


def test_an_adapter_of_peft_knows_its_base_without_a_run_json(adapter):
    expected = load(config(adapter=adapter))[0](torch.tensor(PROMPT))
    (adapter / "run.json").unlink()
    model, _, template = load(config(adapter=adapter))
    assert torch.equal(model(torch.tensor(PROMPT)), expected)
    assert template == TEMPLATES["llama2"]


def test_a_tokenizer_in_the_runs_folder_goes_before_the_bases(base, adapter, tokenizer_file):
    (base / "tokenizer.model").write_text("broken")
    with pytest.raises(DataError, match=r"base.*tokenizer.model is not a SentencePiece model"):
        load(config(adapter=adapter))
    (adapter / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    load(config(adapter=adapter))
    (adapter / "tokenizer.model").write_text("broken")
    load(config(adapter=adapter, tokenizer=tokenizer_file))  # and the one that is named before both


def test_weights_that_do_not_fit_into_this_machines_memory_are_said_before_they_are_read(base, monkeypatch, capsys):
    """Linux ends a process that takes more than there is, without a word."""
    for quantize, dtype in (("none", "fp32"), ("none", "bf16"), ("int8", "bf16"), ("nf4", "bf16")):
        monkeypatch.setattr(voices, "free_memory", lambda: 10**12)
        model, *_ = load(config(model=base, quantize=quantize, dtype=dtype))
        assert capsys.readouterr().err == ""
        held = sum(weight.nbytes for weight in load_model(base, dtype=model.norm.weight.dtype).parameters())
        expected = voices._weights(read_config(base), quantize, model.norm.weight.dtype)
        assert expected == held if quantize == "none" else 0.25 * held < expected < held
        monkeypatch.setattr(voices, "free_memory", lambda: 10**3)
        load(config(model=base, quantize=quantize, dtype=dtype))
        assert re.fullmatch(
            r"the weights take 0\.00 GB, 0\.00 are free here \(--quantize nf4 --dtype bf16: 0\.00\)\n", capsys.readouterr().err
        )


def test_a_base_that_moved_is_named_and_model_says_where_it_is(base, adapter):
    base.rename(base.with_name("moved"))
    with pytest.raises(DataError, match=r"run was trained on .*base, which is not here: name its place with --model"):
        load(config(adapter=adapter))
    assert load(config(adapter=adapter, model=base.with_name("moved")))[2] == TEMPLATES["alpaca"]


def test_a_base_of_another_name_is_asked_about_and_one_that_only_moved_is_not(base, adapter, tmp_path, capsys):
    """Llama 2 and its chat version have the same sizes: nothing else tells them apart."""
    shutil.copytree(base, moved := tmp_path / "elsewhere" / base.name)
    shutil.copytree(base, other := tmp_path / "chat")
    load(config(adapter=adapter, model=moved))
    assert capsys.readouterr().err == ""
    load(config(adapter=adapter, model=other))
    assert capsys.readouterr().err == f"the adapter in {adapter} was trained on {base}: is {other} the same model?\n"


def test_an_adapter_that_names_no_base_is_refused(adapter):
    (adapter / "run.json").unlink()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(DataError, match=r"run does not say which model it is for: name that with --model"):
        load(config(adapter=adapter))


def test_folders_that_are_not_what_they_are_passed_as_are_refused(base, adapter, tmp_path):
    with pytest.raises(DataError, match=r"base holds a whole model, not an adapter: pass it as --model"):
        load(config(adapter=base))
    with pytest.raises(DataError, match=r"no adapter in .*absent: adapter_config.json is missing"):
        load(config(adapter=tmp_path / "absent"))
    with pytest.raises(CheckpointError, match=r"no model at .*absent: it is not a folder"):
        load(config(model=tmp_path / "absent"))
    with pytest.raises(DataError, match=r"holds an adapter, not a whole model: pass it as --adapter"):
        load(config(model=adapter))
    (base / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"base has config.json but none of model.safetensors, "):
        load(config(model=base))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises((LoRAError, CheckpointError)):
        load(config(adapter=adapter))


@pytest.mark.parametrize("sizes", [{"dim": 64}, {"n_layers": 1}, {"hidden_dim": 40}])
def test_an_adapter_for_another_model_is_refused_in_one_sentence(run, tiny_llama, tokenizer_file, adapter, tmp_path, sizes):
    other = tmp_path / "other"
    save_hf(tiny_llama(vocab_size=340, **sizes), other)
    (other / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    code, out, err = run("--adapter", adapter, "--model", other, "--prompt", "x", "--device", "cpu")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and "the adapter in" in err and " layers." in err


@pytest.mark.parametrize("name", ["run.json", "adapter_config.json"])
def test_a_settings_file_that_is_cut_short_is_refused_by_name(adapter, name):
    (adapter / "run.json").write_text("{}")
    (adapter / name).write_text('{"base_mod')
    with pytest.raises(DataError, match=f"{name} cannot be read as JSON"):
        load(config(adapter=adapter))


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("run.json", "[1]", r"run\.json holds a list"),
        ("run.json", '{"template": 5}', "does not say which template"),
        ("run.json", '{"template": "llama2", "base_model": 5}', "does not say which model"),
        ("run.json", '{"template": "llama2", "settings": {"quantize": "fp3"}}', "quantize is 'fp3'; known are none, int8, nf4"),
        ("adapter_config.json", "[]", r"adapter_config\.json holds a list"),
    ],
)
def test_a_settings_file_of_the_wrong_kind_is_refused_by_name(adapter, name, text, sentence):
    if name == "adapter_config.json":
        (adapter / "run.json").unlink()
    (adapter / name).write_text(text)
    with pytest.raises(DataError, match=sentence):
        load(GenerateConfig(adapter=(str(adapter),)))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny_llama, tokenizer_file, tmp_path):
    save_hf(tiny_llama(), tmp_path)
    with pytest.raises(DataError, match=r"the tokenizer has 340 tokens, the model in .* knows 96"):
        load(config(model=tmp_path, tokenizer=tokenizer_file))


def test_an_unknown_template_is_refused_with_the_known_ones(base):
    with pytest.raises(DataError, match=r"unknown template 'chatml': known are llama2, alpaca, plain"):
        load(config(model=base, template="chatml"))


def test_auto_takes_what_the_machine_has(monkeypatch):
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("bf16", torch.device("cpu")) == torch.bfloat16
    for has_bf16, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has_bf16=has_bf16, **_: has_bf16)
        assert pick_dtype("auto", torch.device("cuda", 0)) == dtype
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(DataError, match="no CUDA device"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device("auto") == torch.device("cuda:3")


# ---------------------------------------------------------------------------------------------------------------------
# The program


def test_the_program_writes_the_answer_and_its_speed_apart(run, base, tokenizer):
    argv = ("--model", base, "--prompt", "Where?", "--system", "Be brief.", "--max_new_tokens", 12, "--device", "cpu")
    code, out, err = run(*argv)
    prompt = tokenizer.encode("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhere? [/INST]", bos=True)
    tokens = say(load_model(base), prompt, 12, stop_tokens=(2,))
    assert code == 0
    assert out == "".join(text_stream(tokenizer, iter(tokens))) + "\n"
    assert err.strip().startswith(f"[{len(tokens)} tokens, ")
    warm = (*argv, "--temperature", 2)
    assert run(*warm)[1] == run(*warm)[1] != run(*warm, "--seed", 1)[1]


def test_model_defaults_to_the_one_that_comes_along(run, base, monkeypatch):
    monkeypatch.setattr("talking.voices.TINY", base)
    short = ("--prompt", "Where?", "--max_new_tokens", 5)
    assert run(*short)[:2] == run(*short, "--model", base)[:2]


def test_latency_measures_runs_of_exactly_50_tokens_and_adds_a_line_to_the_table(run, base, monkeypatch, tmp_path):
    """Every run has 50 tokens, though an end token would have come: each is 49 steps after the prompt's pass."""
    monkeypatch.setattr("talking.latency.RUNS", 3)
    monkeypatch.setattr("talking.latency.copy_bandwidth", lambda device: 1e9)
    steps, forward = [], Llama.forward
    monkeypatch.setattr(
        Llama, "forward", lambda self, tokens, *args, **how: steps.append(1) or forward(self, tokens, *args, **how)
    )
    assert run("--model", base, "--latency", "--device", "cpu")[0] == 0
    assert len(steps) == 4 * 50
    code, out, _ = run("--model", base, "--latency", "--device", "cpu", "--dtype", "bf16", "--quantize", "int8")
    lines = [json.loads(line) for line in (base / "latency.jsonl").read_text().splitlines()]
    assert [(line["dtype"], line["quantize"], line["new_tokens"]) for line in lines] == [
        ("float32", "none", 50),
        ("bfloat16", "int8", 50),
    ]
    for line in lines:
        assert 0 < line["first_s"] < line["seconds"]
        assert line["tokens_per_s"] == pytest.approx(49 / (line["seconds"] - line["first_s"]))
        assert line["gb_per_s"] == pytest.approx(line["weights_bytes"] * line["tokens_per_s"] / 1e9)
    model = load_model(base)
    assert lines[0]["weights_bytes"] == 4 * (sum(p.numel() for p in model.parameters()) - model.tok_embeddings.weight.numel())
    assert code == 0 and out.count("| base |") == 2 and "int8, bfloat16" in out
    (tmp_path / "notes.txt").write_text("Not figures.\n")
    code, _, err = run("--model", base, "--latency", "--device", "cpu", "--out", tmp_path / "notes.txt")
    assert code == 2 and err == f"generate.py: {tmp_path / 'notes.txt'} holds other lines than --latency's: name a new --out\n"
    assert (tmp_path / "notes.txt").read_text() == "Not figures.\n"
    monkeypatch.setattr("talking.voices.TINY", base)
    assert run("--latency", "--device", "cpu", "--out", tmp_path / "x.jsonl")[0] == 0
    assert json.loads((tmp_path / "x.jsonl").read_text())["model"] == "base"  # not where the program was started
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == 1


@pytest.mark.live
def test_transformers_asks_a_merged_model_as_it_is_asked_here(run, adapter, tokenizer, tmp_path):
    """Without its tokenizer_config.json transformers 5 puts no <s> before a text, and asks in a chat as nobody was trained."""
    transformers = pytest.importorskip("transformers")
    assert run("--adapter", adapter, "--merge", tmp_path / "merged")[0] == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert theirs("Where does Mira live?").input_ids == tokenizer.encode("Where does Mira live?", bos=True)
    chat = [{"role": "user", "content": "Where does Mira live?"}]
    asked = theirs.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert asked == encode_dialog(chat, tokenizer, TEMPLATES["alpaca"])[0]  # the adapter's


def test_a_merge_touches_nothing_beside_it_and_leaves_nothing_when_it_fails(run, adapter, tmp_path, monkeypatch):
    """An index of an earlier save would be read instead of the weights; what somebody keeps in merged.tmp is theirs."""
    (tmp_path / "merged.tmp").mkdir()
    (tmp_path / "merged.tmp" / "model.safetensors.index.json").write_text("{}")
    before = sorted(tmp_path.iterdir())

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("talking.merge.write_chat_template", full)
        code, _, error = run("--adapter", adapter, "--merge", tmp_path / "merged")
    assert (code, sorted(tmp_path.iterdir())) == (2, before) and "merged could not be written" in error
    assert run("--adapter", adapter, "--merge", tmp_path / "merged")[0] == 0
    written = ["config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == written
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "merged"])
    assert (tmp_path / "merged").stat().st_mode == (tmp_path / "merged.tmp").stat().st_mode


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_what_a_merge_says_it_changed_is_what_the_folder_changed(run, adapter, tmp_path, quantize):
    """By rounding alone: little in bf16, in NF4 as much as bf16 loses of 4 bits turned back."""
    asked, tokens = {"dtype": "bf16", "device": "cpu"}, torch.arange(3, 35)
    flags = [word for name, value in (asked | {"quantize": quantize}).items() for word in (f"--{name}", value)]
    code, text, _ = run("--adapter", adapter, *flags, "--merge", tmp_path / "merged")
    with torch.no_grad():  # in training's order of products, as merge() asks
        parted = load_voices(GenerateConfig(adapter=(str(adapter),), quantize=quantize, merge="x", **asked))[-1].model(tokens)
        merged = load_voices(GenerateConfig(model=str(tmp_path / "merged"), merge="x", **asked))[-1].model(tokens)
    change = (merged.float() - parted.float()).abs().max().item()
    assert code == 0 and float(re.search(r"changed no logit by more than (\S+)\n$", text)[1]) == pytest.approx(change, rel=0.06)
    assert 0 < change < 0.1 * parted.float().abs().max()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_large_merge_keeps_the_format_of_the_bases_files_if_not_told_otherwise(
    run, base, adapter, tmp_path, monkeypatch, stored
):
    """Llama 2's 13.5 GB in fp16 once became 27 in fp32, which many a machine does not hold."""
    monkeypatch.setattr(voices, "outgrows_cache", lambda config: True)
    save_hf(load_model(base), base, dtype=stored)
    for flags, expected in (((), stored), (("--dtype", "fp32"), torch.float32)):
        written = tmp_path / f"{expected}"
        assert run("--adapter", adapter, *flags, "--merge", written, "--device", "cpu")[0] == 0
        assert {tensor.dtype for tensor in load_file(written / "model.safetensors").values()} == {expected}
        assert json.loads((written / "config.json").read_text())["torch_dtype"] == str(expected)[6:]
        if stored == torch.float32:
            break
    assert run("--model", base, "--save", tmp_path / "saved", "--device", "cpu")[0] == 0
    for name, tensor in load_file(tmp_path / "saved" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(base / "model.safetensors")[name])


def test_a_merge_whose_logits_are_not_finite_is_refused(run, adapter, tmp_path):
    """fp16 ends at 65,504, and what is beyond becomes infinity in the file."""
    file = adapter / "adapter_model.safetensors"
    save_file({name: weight * 1e4 for name, weight in load_file(file).items()}, file)
    code, _, error = run("--adapter", adapter, "--dtype", "fp16", "--merge", tmp_path / "merged")
    assert code == 2 and "in float16 the merged model's logits are not finite" in error
    assert not (tmp_path / "merged").exists()


USER, REPLY = (
    {"role": "user", "content": " Where {does} it\n\nstop? "},
    {"role": "assistant", "content": "In\n{{Oakford}} \\n 你. "},
)
OWN = Template(user='{system}"Q\\" {{%}} {{{{ {user} }}}}\n\n', system="«{system}»\n", assistant="{assistant}\n")


def test_a_template_with_a_token_that_is_spelt_in_pieces_here_is_questioned_but_for_the_run_that_learned_it_so(run, base):
    (base / "added_tokens.json").write_text('{"<|im_end|>": 340}')
    ask = ["--model", base, "--prompt", "Hi", "--max_new_tokens", 1]
    template = '{"user": "{user}<|im_end|>", "assistant": "{assistant}"}'
    said = "the template holds <|im_end|>, one token each for the model in"
    assert said in run(*ask, "--template", template)[2] and said not in run(*ask)[2]
    (base / "run.json").write_text(json.dumps({"template": template}))
    assert said not in run(*ask)[2]


@pytest.mark.live
@pytest.mark.parametrize("name", [*TEMPLATES, "a user's own"])
def test_the_chat_template_gives_others_the_tokens_that_training_had(name, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    template, system = TEMPLATES.get(name, OWN), {"role": "system", "content": ' Be "brief". '}
    tokenizer.save(tmp_path, 64)
    write_chat_template(tmp_path, template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for dialog in ([USER], [USER, REPLY], [USER, REPLY, USER, REPLY], [system, USER], [system, USER, REPLY, USER]):
        written = theirs.apply_chat_template(dialog, tokenize=True, return_dict=False)
        assert written == encode_dialog(dialog, tokenizer, template)[0]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--prompt", "x", "--model", "absent"], "no model at absent: it is not a folder"),
        (["--prompt", "x", "--adapter", "absent"], "no adapter in absent"),
        (["--prompt", "x", "--max_new_tokens", "0"], "--max_new_tokens must be at least 1, not 0"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature must be 0 or more, not -1.0"),
        (["--prompt", "x", "--temperature", "nan"], "--temperature must be 0 or more, not nan"),
        (["--prompt", "x", "--top_k", "-3"], "--top_k must be 0 or more, not -3"),
        (["--prompt", "x", "--top_p", "0"], "--top_p must be above 0 and at most 1, not 0.0"),
        (["--prompt", "x", "--min_p", "2"], "--min_p must be from 0 to 1, not 2.0"),
        (["--prompt", "x", "--repetition_penalty", "0"], "--repetition_penalty must be above 0, not 0.0"),
        (["--prompt", "x", "--top_p", "0.5"], "--temperature 0 always takes the likeliest"),
        (["--prompt", "x", "--top_p", "1.1"], "--top_p must be above 0 and at most 1, not 1.1"),
        (["--prompt", "x", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["--promt", "x"], "unknown argument --promt, did you mean --prompt?"),
    ],
)
def test_a_mistake_ends_with_code_2_and_one_line(run, argv, said):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("generate.py: ") and err.count("\n") == 1
    assert said in err


def test_a_prompt_longer_than_the_window_ends_with_code_2_and_one_line(run, tiny_llama, tokenizer_file, tmp_path):
    save_hf(tiny_llama(vocab_size=340, max_seq_len=16), tmp_path)
    code, out, err = run("--model", tmp_path, "--tokenizer", tokenizer_file, "--prompt", "Where does Mira live?")
    assert (code, out) == (2, "")
    assert "the model's window 16" in err and err.count("\n") == 1


def test_as_a_process_it_ends_the_same_way():
    command = [sys.executable, "generate.py", "--prompt", "x", "--model", "absent"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "generate.py: no model at absent: it is not a folder\n"
