"""What runs otherwise on a GPU, held against the same on the CPU: where there is none, all of this is skipped."""

import gc
import json
import re

import pytest
import torch

import train as train_script
from generate import TINY, Sampling, compile_decoding, generate_batch
from lora import add_lora, lora_parameters
from model import load_model, save_hf
from quant import QUANTIZERS
from train import RunError, complete, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
METHODS = {
    "lora": {},
    "qlora": {"method": "qlora"},
    "int8": {"quantize": "int8"},
    "full": {"method": "full"},
    "full, 8-bit AdamW": {"method": "full", "optim": "adamw_8bit"},
    "full, stepped in backward": {"method": "full", "optimizer_in_backward": True, "max_grad_norm": 0.0},
}
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def folder(tmp_path, tiny_llama, tokenizer_file):
    """A model whose sizes suit the GPU's kernels (heads of 64, rows of 256), its tokenizer, and 24 records."""
    model = tiny_llama(dim=256, n_heads=4, n_kv_heads=2, hidden_dim=512, vocab_size=340)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.3) if weight.dim() > 1 else None  # wider than the usual tiny one: its logits should not be hundreds
    save_hf(model, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    words = "ferry nine dark Mira lives Oakford clocks mends returns leaves".split()
    records = [{"prompt": f"Where {words[i % 10]}?", "response": " ".join(words[i % 7 : i % 7 + 1 + i % 4])} for i in range(24)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return tmp_path


def flags(folder, name, **more) -> dict:
    given = {"model": str(folder / "base"), "data": [str(folder / "data.jsonl")], "output_dir": str(folder / name)}
    given |= {"model_max_length": 128, "max_steps": 6, "logging_steps": 1, "save_steps": 0, "samples": 0, "learning_rate": 1e-3}
    return given | more


def losses(folder, name, **more) -> list[float]:
    return [row["loss"] for row in train(complete(flags(folder, name, **more))) if "loss" in row]


@every_method
def test_a_run_has_the_losses_it_has_on_a_cpu(folder, method):
    here = losses(folder, "here", device="cpu", dtype="fp32", **METHODS[method])
    there = losses(folder, "there", device=DEVICE, dtype="fp32", **METHODS[method])
    assert len(there) == 6 and there[-1] < there[0]
    assert there == pytest.approx(here, rel=2e-3)


@every_method
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_in_16_bits_with_flash_attention_and_checkpointing_the_losses_are_nearly_those_of_fp32(folder, method, dtype):
    if dtype == "fp16" and "backward" in method:
        pytest.skip("a scaler needs the whole gradient")
    here = losses(folder, "here", device="cpu", dtype="fp32", **METHODS[method])
    more = METHODS[method] | {"gradient_checkpointing": True}
    assert losses(folder, "there", device=DEVICE, dtype=dtype, **more) == pytest.approx(here, rel=3e-2)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_compiled_blocks_train_as_the_others(folder, method):
    torch.compiler.reset()
    eager = losses(folder, "eager", device=DEVICE, dtype="bf16", **METHODS[method])
    compiled = losses(folder, "compiled", device=DEVICE, dtype="bf16", compile=True, **METHODS[method])
    assert compiled == pytest.approx(eager, rel=1e-2)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_died_resumes_with_the_losses_of_one_that_did_not(folder, method, background, monkeypatch):
    more = {"device": DEVICE, "dtype": "fp32", "save_steps": 2, "async_save": background, **METHODS[method]}
    whole, step, turns = losses(folder, "whole", **more), train_script.training_step, []

    def dying(*args):
        turns.append(0)
        if len(turns) == 6:
            raise RuntimeError("struck")
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_script, "training_step", dying)
        with pytest.raises(RuntimeError, match="struck"):
            losses(folder, "run", **more)
    assert losses(folder, "run", resume=True, **more) == pytest.approx(whole, rel=1e-4)


def test_a_run_says_its_peak_within_3_percent(folder, capsys):
    torch.compiler.reset()
    gc.collect()  # what the tests before have left would count
    losses(folder, "run", device=DEVICE, dtype="bf16", model_max_length=1024, method="full")
    said = re.search(r"memory: a peak of [\d.]+ GB .*, ([+-][\d.]+)% off", capsys.readouterr().out)
    assert abs(float(said[1])) < 3


def test_out_of_memory_is_explained(folder):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0001)  # of an 80 GB card: 8 MB
    try:
        with pytest.raises(RunError, match=r"out of memory: .* GB were in use, a peak of .* GB was predicted"):
            losses(folder, "run", device=DEVICE, method="full")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def said(model, batch: int) -> dict[int, list[int]]:
    prompts, tokens = [[1, 300 + i, 60 + i, 70] for i in range(batch)], {i: [] for i in range(batch)}
    for index, token in generate_batch(model, prompts, Sampling(max_new_tokens=12)):
        tokens[index].append(token)
    return tokens


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize("source", ["base", "tiny"])  # tiny/'s rows of 192 numbers are none for the kernel of NF4
def test_greedy_answers_are_those_of_a_cpu_with_a_graph_and_without(folder, source, quantize, batch):
    path = TINY if source == "tiny" else folder / source

    def build(device):
        model = load_model(path, device=torch.device(device), dtype=torch.float32, quantize=QUANTIZERS[quantize])
        for weight in lora_parameters(add_lora(model, rank=4, alpha=8.0, dropout=0.0, rslora=False)).values():
            weight.data.copy_(torch.linspace(-0.05, 0.05, weight.numel()).view(weight.shape))
        return model.eval()

    here, there = said(build("cpu"), batch), build(DEVICE)
    assert said(there, batch) == here
    torch.compiler.reset()
    compile_decoding(there)
    with torch._inductor.config.patch({"triton.cudagraph_or_error": True}):  # or kernel by kernel, with a warning
        assert said(there, batch) == here
        assert said(there, batch) == here  # the graph as it was recorded
