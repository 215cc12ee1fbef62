"""train.py: the step is right, a run is exact and can be resumed, and a user's mistake costs nothing."""

import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import answer, load
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import train as train_script
from data import TEMPLATES, DataError, PackedBatches, encode_documents
from generate import GenerateConfig, Sampling
from helping.files import free_memory
from lora import load_adapter
from memory import Tracker
from model import CheckpointError, from_hf, load_model, read_config, save_hf, save_meta
from running import checkpoint as checkpoint_script
from running import folder as folder_script
from running.checkpoint import checkpoints
from running.exam import Exam
from running.plan import beginning, make_plan
from running.reading import read_data
from running.workers import meet, restarts
from sizing.rehearsal import Memory, copied
from train import RunError, TrainConfig, Workers, complete, learning_rate, make_optimizer, train, training_step
from weights.chat import write_chat_template

REPOSITORY = Path(__file__).resolve().parent.parent
TIMES = ("tokens_per_second", "peak_memory_bytes")  # the only fields of a log that differ between equal runs


@pytest.fixture
def base(tmp_path, tiny_llama, tokenizer_file):
    """A folder with a small random model and its tokenizer, and files of 30 and 6 records."""
    save_meta(tiny_llama(vocab_size=340), tmp_path / "base")
    (tmp_path / "base" / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    words = "ferry nine dark Mira lives Oakford clocks mends returns leaves".split()
    for name, count in (("data", 30), ("held", 6)):
        records = [
            {"prompt": f"Where {words[i % 10]}?", "response": " ".join(words[i % 7 : i % 7 + 1 + i % 4])} for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return tmp_path


def flags(base, run="run", **more):
    given = {
        "model": str(base / "base"),
        "data": [str(base / "data.jsonl")],
        "output_dir": str(base / run),
        "model_max_length": 64,
        "max_steps": 6,
        "logging_steps": 1,
        "save_steps": 2,
        "samples": 1,
        "learning_rate": 1e-2,
        "device": "cpu",
    }
    return given | more


def run(base, name="run", **more) -> list[dict]:
    return without_times(train(complete(flags(base, name, **more))))


def command(base, name="run", launcher=(sys.executable,), **more) -> list[str]:
    words = [*launcher, str(REPOSITORY / "train.py")]
    for flag, value in flags(base, name, **more).items():
        words += [f"--{flag}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def torchrun(processes: int, *more):
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *more)


def spoiled(base, program, launcher=None, name="run", **more) -> list[str]:
    """The command of a run by a program that imports train.py and changes something in it: of two processes, of one
    (launcher 1), or as `launcher` begins it. Without a program it is train.py itself."""
    words = command(base, name, launcher={None: torchrun(2), 1: (sys.executable,)}.get(launcher, launcher), **more)
    if program:
        (base / "spoiled.py").write_text(program)
        place = words.index(str(REPOSITORY / "train.py"))
        words[place : place + 1] = [str(base / "spoiled.py"), str(REPOSITORY)]
    return words


def in_a_process(words, **how):
    return subprocess.run(words, capture_output=True, text=True, timeout=120, **how)


def log_of(folder) -> list[dict]:
    return without_times([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()])


def without_times(rows):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def saved(folder) -> dict:
    """A checkpoint's state.json, and under "weights" its trained weights."""
    state = json.loads((folder / "state.json").read_text())
    tensors = {name: torch.empty(shape) for name, shape in state["shapes"].items()}
    dcp.load(tensors, storage_reader=FileSystemReader(folder), no_dist=True)
    return state | {"weights": {name.removeprefix("weights."): x for name, x in tensors.items()}}


def taken_back(folder, step) -> Path:
    """The folder of a run that is finished, as if it had been killed soon after a step: without what it left then."""
    for later in checkpoints(folder):
        if int(later.name.split("-")[1]) > step:
            shutil.rmtree(later)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    return folder


def losses(rows):
    return [row["loss"] for row in rows if "loss" in row]


def step_gradients(model, micro_batches, max_grad_norm=0.0):
    """The gradients that one training_step leaves behind when the optimizer does not touch them, and clipping as asked."""
    config = TrainConfig(max_grad_norm=max_grad_norm)
    optimizer = make_optimizer(config, model)
    optimizer.step = lambda: None
    optimizer.zero_grad = lambda **_: None
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    workers = Workers(torch.device("cpu"))
    loss, *_ = training_step(
        config, model, optimizer, scaler, micro_batches, 1, 0.0, workers, partial(torch.autocast, "cpu", enabled=False)
    )
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return loss, gradients


def ragged_documents(base, tokenizer):
    dialogs = [
        [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "ferry " * n}] for n in (1, 9, 2, 3, 7, 1, 1, 5)
    ]
    return encode_documents(dialogs, tokenizer, TEMPLATES["llama2"], max_length=64)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The step


def test_accumulated_gradients_equal_those_of_one_big_batch(base, tiny_llama, tokenizer):
    documents = ragged_documents(base, tokenizer)
    model = tiny_llama(vocab_size=340)
    small, big = PackedBatches(documents, 64, shuffle=False), PackedBatches(documents, 64 * 8, shuffle=False)
    assert len(small) > 2 and len(big) == 1
    parts = [small.batch(0, i) for i in range(len(small))]
    counts = {int((part["labels"] >= 0).sum()) for part in parts}
    assert len(counts) > 1  # ragged: with equal counts a mean of means would be right as well
    loss, accumulated = step_gradients(model, parts)
    whole_loss, whole = step_gradients(model, [big.batch(0, 0)])
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    for a, b in zip(accumulated, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    # The control: the mean of the micro-batches' own means is another number.
    means = [float(model(**part).detach()) / int((part["labels"] >= 0).sum()) for part in parts]
    assert abs(sum(means) / len(means) - whole_loss) > 1e-3


def test_packed_gradients_equal_those_of_one_document_at_a_time(base, tiny_llama, tokenizer):
    documents = ragged_documents(base, tokenizer)
    model = tiny_llama(vocab_size=340)
    packed = PackedBatches(documents, 64 * 8, shuffle=False)
    alone = [PackedBatches([document], len(document[0]), shuffle=False).batch(0, 0) for document in documents]
    loss, gradients = step_gradients(model, [packed.batch(0, 0)])
    alone_loss, alone_gradients = step_gradients(model, alone)
    assert loss == pytest.approx(alone_loss, rel=1e-6)
    for a, b in zip(gradients, alone_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_gradient_longer_than_max_grad_norm_is_cut_to_it(base, tiny_llama, tokenizer):
    model, batch = tiny_llama(vocab_size=340), PackedBatches(ragged_documents(base, tokenizer), 64).batch(0, 0)
    _, whole = step_gradients(model, [batch])
    length = float(sum(gradient.square().sum() for gradient in whole)) ** 0.5
    for limit, share in ((length / 2, 0.5), (length * 2, 1)):
        _, cut = step_gradients(model, [batch], limit)
        torch.testing.assert_close(cut, [gradient * share for gradient in whole], rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_not_finite_stops_the_step_though_the_loss_is(base, tiny_llama, tokenizer):
    model, batch = tiny_llama(vocab_size=340), PackedBatches(ragged_documents(base, tokenizer), 64).batch(0, 0)
    model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(RunError, match=r"the gradient is (nan|inf)"):
        step_gradients(model, [batch])


def test_with_the_optimizer_in_backward_a_loss_that_is_not_finite_moves_no_weight(base, tiny_llama, tokenizer):
    model, batch = tiny_llama(vocab_size=340), PackedBatches(ragged_documents(base, tokenizer), 64).batch(0, 0)
    config = TrainConfig(method="full", optimizer_in_backward=True, max_grad_norm=0.0)
    optimizer, scaler = make_optimizer(config, model), torch.amp.GradScaler("cpu", enabled=False)
    train_script.step_in_backward(model, optimizer)
    model.norm.weight.data[0] = math.inf
    workers, autocast = Workers(torch.device("cpu")), partial(torch.autocast, "cpu", enabled=False)
    before = model.output.weight.detach().clone()
    with pytest.raises(RunError, match="the loss is"):
        training_step(config, model, optimizer, scaler, [batch], 1, 1.0, workers, autocast)
    assert torch.equal(model.output.weight, before)


def test_the_held_out_loss_is_the_mean_over_all_supervised_tokens(base, tiny_llama, tokenizer):
    model, batches = tiny_llama(vocab_size=340), PackedBatches(ragged_documents(base, tokenizer), 64, shuffle=False)
    rows = [batches.batch(0, i) for i in range(len(batches))]
    counts = [int((row["labels"] >= 0).sum()) for row in rows]
    assert len(set(counts)) > 1  # or else a mean of means would be right as well
    expected = sum(float(model(**row).detach()) for row in rows) / sum(counts)
    workers, autocast = Workers(torch.device("cpu")), partial(torch.autocast, "cpu", enabled=False)
    assert train_script.evaluate(model, batches, workers, autocast) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_the_optimizer_has_the_numbers_of_the_flags_and_norms_never_decay(tiny_llama, optim):
    flags = {"weight_decay": 0.3, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    groups = make_optimizer(TrainConfig(method="full", optim=optim, **flags), tiny_llama()).param_groups
    found = [(group["weight_decay"], group["betas"], group["eps"], {p.dim() for p in group["params"]}) for group in groups]
    assert found == [(0.3, (0.8, 0.95), 1e-6, {2}), (0.0, (0.8, 0.95), 1e-6, {1})]


def test_a_part_of_an_epoch_or_of_a_step_is_rounded_up():
    batches = PackedBatches([(torch.arange(8).numpy(),) * 2] * 3, 8)
    config = TrainConfig(num_train_epochs=1.25, gradient_accumulation_steps=2)
    workers = Workers(torch.device("cpu"))
    fresh = beginning(config, SimpleNamespace(batches=batches, evaluations={}), 1)
    plan = make_plan(config, batches, fresh, fresh, 1.0, torch.float32, workers)
    assert (plan.steps_per_epoch, plan.total) == (2, 3)  # 3 rows, 2 a step; 2.5 steps


def test_learning_rate_rises_over_the_warm_up_then_follows_its_schedule():
    def rates(**settings):
        return [learning_rate(TrainConfig(warmup_ratio=0.2, **settings), step, 10, 1.0) for step in range(10)]

    assert rates(lr_scheduler_type="constant") == [0.5] + [1.0] * 9
    assert rates(lr_scheduler_type="linear") == pytest.approx([0.5, 1, *(1 - k / 8 for k in range(8))])
    assert rates(lr_scheduler_type="cosine") == pytest.approx([0.5, 1, *((1 + math.cos(math.pi * k / 8)) / 2 for k in range(8))])


def test_default_learning_rate_is_the_usual_one_for_7b_and_grows_as_models_get_narrower():
    assert train_script.peak_learning_rate(TrainConfig(method="lora"), 4096) == 2e-4
    assert train_script.peak_learning_rate(TrainConfig(method="full"), 4096) == 2e-5
    assert train_script.peak_learning_rate(TrainConfig(method="full"), 1024) == 8e-5
    assert train_script.peak_learning_rate(TrainConfig(learning_rate=3e-4), 1024) == 3e-4


# ---------------------------------------------------------------------------------------------------------------------
# A run


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_learns_and_with_a_learning_rate_of_zero_it_does_not(base, method):
    more = {"method": method, "max_steps": 25, "save_steps": 0, "eval_data": [str(base / "held.jsonl")]}
    learned, control = (
        [row["eval_held_loss"] for row in run(base, name, **more | {"learning_rate": rate}) if "eval_held_loss" in row]
        for name, rate in (("learns", 1e-2), ("control", 0.0))
    )
    assert learned[-1] < learned[0] - 1
    assert control[-1] == control[0] == learned[0]


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(base):
    one, same, other = (losses(run(base, name, seed=seed, save_steps=0)) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert one == same
    assert one != other


def test_gradient_checkpointing_changes_no_loss(base):
    plain = losses(run(base, "plain", save_steps=0))
    assert losses(run(base, "checkpointed", save_steps=0, gradient_checkpointing=True)) == pytest.approx(plain, rel=1e-6)


def test_a_run_on_a_cpu_keeps_the_memory_that_it_frees(base, monkeypatch):
    """The pages that later steps ask the system for: with the call all but none, without it thousands."""
    called = []
    monkeypatch.setattr(train_script, "keep_freed_memory", lambda: called.append(True))
    run(base, max_steps=1)
    assert called
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc's malloc takes the advice")
    program = """
import resource, sys, torch
from helping.malloc import keep_freed_memory
from model import Llama, ModelConfig
if sys.argv[1] == "kept":
    keep_freed_memory()
model = Llama(ModelConfig(dim=256, n_layers=2, n_heads=4, n_kv_heads=4, hidden_dim=512, vocab_size=8000)).bfloat16()
tokens = torch.arange(1024)
for step in range(6):
    if step == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model(tokens, labels=tokens).backward()
    model.zero_grad()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    kept, given_back = (int(in_a_process([sys.executable, "-c", program, how], cwd=REPOSITORY).stdout) for how in ("kept", "not"))
    assert 2 * kept < given_back


def test_textbook_attention_gives_the_same_losses(base):
    fused = losses(run(base, "fused", save_steps=0))
    assert losses(run(base, "textbook", save_steps=0, attention="textbook")) == pytest.approx(fused, rel=1e-5)


@pytest.mark.parametrize(("method", "dtype"), [("lora", "bf16"), ("full", "bf16"), ("lora", "fp16"), ("full", "fp16")])
def test_16_bit_runs_stay_near_the_fp32_run(base, method, dtype):
    exact = losses(run(base, "exact", method=method, save_steps=0))
    near = losses(run(base, "near", method=method, dtype=dtype, save_steps=0))
    assert near == pytest.approx(exact, rel=0.03) and near != exact


def test_the_folder_of_a_run_holds_all_that_was_promised(base):
    run(base, eval_split=0.2, exact_match=True)
    folder = base / "run"
    settings = json.loads((folder / "run.json").read_text())
    assert settings["template"] == "llama2" and settings["base_model"] == str(base / "base")
    assert settings["settings"]["model_max_length"] == 64 and settings["versions"]["torch"] == torch.__version__
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    keys = ("step", "epoch", "loss", "learning_rate", "grad_norm", "supervised_tokens", "tokens_per_second", "peak_memory_bytes")
    assert len(steps) == 6 and all(row.keys() == set(keys) for row in steps)
    assert [row["step"] for row in rows if "eval_held_out_loss" in row] == [0, 6]
    assert {"exact_match_before", "exact_match_after"} <= rows[-1].keys()
    samples = (folder / "samples.md").read_text()
    assert all(word in samples for word in ("**user:**", "- reference:", "- before:", "- after:"))
    assert (folder / "tokenizer.model").read_bytes() == (base / "base" / "tokenizer.model").read_bytes()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.glob("*.tmp"))


def test_only_the_newest_checkpoints_are_kept(base):
    run(base, save_total_limit=2)
    assert sorted(path.name for path in (base / "run").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("background", [False, True])
def test_an_old_checkpoint_that_cannot_be_removed_is_named(base, monkeypatch, background):
    def refused(path, **how):
        if Path(path).name.startswith("checkpoint-") and not how:
            raise OSError(30, "Read-only file system", "__0_0.distcp")  # rmtree names the file alone
        removed(path, **how)

    removed = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", refused)
    with pytest.raises(RunError, match=r"could not remove .*run/checkpoint-0, the newer ones stand: Read-only file system$"):
        run(base, save_total_limit=1, async_save=background)
    assert (base / "run" / "checkpoint-2" / "state.json").exists()


def test_a_full_run_saves_the_model_it_trained_and_generate_finds_its_template(base):
    run(base, method="full", template="plain")
    model, _, template = load(GenerateConfig(model=str(base / "run"), device="cpu"))
    assert template == TEMPLATES["plain"]
    state = saved(base / "run" / "checkpoint-6")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, state["weights"][name])


def test_generate_finds_the_base_and_the_adapter_of_a_lora_run(base):
    run(base)
    model, _, _ = load(GenerateConfig(adapter=(str(base / "run"),), device="cpu"))
    state = saved(base / "run" / "checkpoint-6")
    own = dict(model.named_parameters())
    assert len(state["weights"]) == 2 * 7 * 2  # A and B of seven linears in two layers
    assert all(torch.equal(own[name], weight) for name, weight in state["weights"].items())


@pytest.mark.parametrize("background", [False, True])
def test_the_best_weights_are_loaded_at_the_end_when_asked(base, monkeypatch, background):
    told = iter([5.0, 4.0, 3.0, 3.5, 6.0])  # the held-out loss after steps 0, 2, 4, 6, 8
    # The prediction of memory rehearses an evaluation as well, of rows of its own.
    monkeypatch.setattr(train_script, "evaluate", lambda _, rows, *__: next(told) if isinstance(rows, PackedBatches) else 0.0)
    run(base, eval_data=[str(base / "held.jsonl")], eval_steps=2, max_steps=8, load_best_model_at_end=True, async_save=background)
    best = saved(base / "run" / "best")
    assert best["step"] == 4 and best["best"] == 3.0
    model = load_adapter(load_model(base / "base"), base / "run", partial(from_hf, config=load_model(base / "base").config))
    own = dict(model.named_parameters())
    assert all(torch.equal(own[name], weight) for name, weight in best["weights"].items())
    last = saved(base / "run" / "checkpoint-8")
    assert not any(torch.equal(own[name], weight) for name, weight in last["weights"].items())


def test_a_run_whose_best_weights_are_gone_says_so_as_it_resumes_and_can_be_ended_without_them(base, monkeypatch):
    """It said so at its end, with a remedy that was none: whatever was removed, it could never be ended."""
    told = iter([3.0, 1.0, 2.0, 4.0, 4.0])  # after steps 0, 2, 4, 6, and 6 again
    monkeypatch.setattr(train_script, "evaluate", lambda _, rows, *__: next(told) if isinstance(rows, PackedBatches) else 0.0)
    more = {"eval_data": [str(base / "held.jsonl")], "eval_steps": 2, "save_total_limit": 0}
    run(base, load_best_model_at_end=True, **more)
    shutil.rmtree(taken_back(base / "run", 4) / "best")
    resume = {"resume": True, "output_dir": str(base / "run")}
    with pytest.raises(RunError, match=r"best/state.json is missing; --load_best_model_at_end False ends the run with its last"):
        train(complete(resume))
    train(complete(resume | {"load_best_model_at_end": False}))
    model = load_adapter(load_model(base / "base"), base / "run", partial(from_hf, config=load_model(base / "base").config))
    own, last = dict(model.named_parameters()), saved(base / "run" / "checkpoint-6")
    assert all(torch.equal(own[name], weight) for name, weight in last["weights"].items())


def test_where_no_held_out_loss_was_a_number_the_last_weights_are_kept(base, monkeypatch, capsys):
    monkeypatch.setattr(train_script, "evaluate", lambda *_: math.nan)
    run(base, eval_data=[str(base / "held.jsonl")], eval_steps=2, load_best_model_at_end=True)
    assert "no held-out loss was a number: the last weights are kept" in capsys.readouterr().out
    model = load_adapter(load_model(base / "base"), base / "run", partial(from_hf, config=load_model(base / "base").config))
    last = saved(base / "run" / "checkpoint-6")["weights"]
    assert all(torch.equal(weight, last[name]) for name, weight in model.named_parameters() if name in last)
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (base / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["eval_held_loss"] for row in rows if "eval_held_loss" in row] == [None] * 4
    taken_back(base / "run", 4)  # no best weights are there, and none are missed
    assert losses(train(complete({"resume": True, "output_dir": str(base / "run")}))) == losses(rows)


def test_questions_asked_together_get_the_replies_that_each_gets_alone(base):
    words = "ferry nine dark Mira lives Oakford clocks mends returns leaves".split()
    records = [{"prompt": " ".join(words[: 1 + i % 7]) + "?", "response": " ".join(words[: i % 9 + 1])} for i in range(45)]
    (base / "held.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for row, exact in ((64, False), (512, True), (4096, True)):
        config = complete(
            flags(
                base, eval_data=[str(base / "held.jsonl")], exact_match=exact, samples=9, model_max_length=row, template="plain"
            )
        )
        data, model = read_data(config, lambda _: None), load_model(base / "base")
        exam = Exam(config, data, model, Workers(torch.device("cpu")))
        sizes = [len(group) for group in exam.groups(exam.asked)]
        assert sizes == [1] * 9 if row == 64 else sum(sizes) == 45 and 4 < max(sizes) <= 32
        replies = exam.ask()
        for dialog, reply in zip(exam.asked, replies, strict=True):
            limit = len(data.tokenizer.encode(dialog[-1]["content"])) + 8 if exact else 128
            alone = answer(model, data.tokenizer, data.template, dialog[:-1], Sampling(max_new_tokens=limit))
            assert reply == alone.strip()
        assert len(set(replies)) > 5


def exam_of(base, **more) -> Exam:
    config = complete(flags(base, **more))
    return Exam(config, read_data(config, lambda _: None), load_model(base / "base"), Workers(torch.device("cpu")))


def test_a_question_is_asked_where_the_window_has_room_for_its_reply(base):
    exam = exam_of(base, eval_data=[str(base / "held.jsonl")])
    dialog, sizes = exam.asked[0], exam.model.config
    for room, fits in ((128, True), (127, False)):
        exam.model = SimpleNamespace(config=replace(sizes, max_seq_len=len(exam.prompt(dialog)) + room))
        assert exam.fits(dialog) == fits
    exam.model = SimpleNamespace(config=sizes)
    assert not exam.fits(dialog[:-1])  # which ends on a question


def test_the_ranks_share_out_the_questions(base):
    exam = exam_of(base, eval_data=[str(base / "held.jsonl")], exact_match=True)
    whole, shares = exam.ask(), []
    for rank in (0, 1):
        exam.workers = SimpleNamespace(rank=rank, world=2, gather=lambda replies: replies)
        shares.append(exam.ask())
    assert shares == [whole[::2], whole[1::2]] and len(whole) == 6


def test_right_replies_are_counted_file_by_file_before_and_after(base):
    (base / "other.jsonl").write_text('{"prompt": "Who?", "response": " Mira "}\n{"prompt": "When?", "response": "nine"}\n')
    exam = exam_of(base, eval_data=[str(base / "held.jsonl"), str(base / "other.jsonl")], exact_match=True)
    right = [dialog[-1]["content"].strip() for dialog in exam.asked]
    rows = list(exam.report(base, [*right[:3], *["no"] * 5], [*right[:7], "no"]))
    assert rows == [
        {"eval_data": "held", "exact_match_before": 0.5, "exact_match_after": 1.0},
        {"eval_data": "other", "exact_match_before": 0.0, "exact_match_after": 0.5},
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Exactness: resuming, and more than one process


DIES = """
import os, random, signal, sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
import train
row_seed, death = train.row_seed, []
def dying(seed, step, rank):
    begun = Path(__file__).with_name(f"{rank} is to die")
    if step == (5, 8)[rank] and not begun.exists():
        begun.touch()
        death.append(threading.Timer(random.uniform(0, 0.05), os.kill, (os.getpid(), signal.SIGKILL)))
        death[0].start()
    if death and step == (7, 10)[rank]:
        death[0].join()
    return row_seed(seed, step, rank)
train.row_seed = dying
train.main()
"""  # once in each rank, a while after the beginning of a step and before that of the next but one


@pytest.mark.parametrize(("method", "background"), [("lora", False), ("full", False), ("full", True)])
def test_a_run_killed_at_any_moment_resumes_with_the_same_losses_to_the_bit(base, method, background):
    more = {
        "method": method,
        "async_save": background,
        "max_steps": 12,
        "lora_dropout": 0.1,
        "eval_data": [str(base / "held.jsonl")],
        "eval_steps": 3,
    }
    whole = run(base, "whole", **more)
    assert in_a_process(spoiled(base, DIES, 1, "killed", **more)).returncode == -signal.SIGKILL
    (base / "killed" / "checkpoint-98.tmp").mkdir()  # what a kill in the middle of a save leaves
    resumed = without_times(train(complete({"resume": True, "output_dir": str(base / "killed")})))
    assert resumed == whole == log_of(base / "killed")
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    assert (base / "killed" / name).read_bytes() == (base / "whole" / name).read_bytes()


def test_the_run_goes_on_while_a_checkpoint_is_written_and_what_is_written_is_its_step(base, monkeypatch):
    """The save after step 2 waits for step 4 to begin; if the run waited for the save, neither would go on."""
    whole = run(base, "whole", save_total_limit=0)
    begun, late, steps, write = threading.Event(), [], [], checkpoint_script.write_checkpoint
    step = train_script.training_step

    def counted(*given):
        if any(isinstance(x, FakeTensor) for x in given[4][0].values()):  # the rehearsal for memory
            return step(*given)
        steps.append(1)
        if len(steps) == 4:
            begun.set()
        return step(*given)

    def held_up(folder, *given):
        if folder.name == "checkpoint-2":
            late.append(begun.wait(60))
        write(folder, *given)

    monkeypatch.setattr(train_script, "training_step", counted)
    monkeypatch.setattr(checkpoint_script, "write_checkpoint", held_up)
    assert run(base, async_save=True, save_total_limit=0) == whole
    assert late == [True]
    for saved_by in checkpoints(base / "whole"):
        other, one = saved(base / "run" / saved_by.name), saved(saved_by)
        assert one["step"] == other["step"] and without_times(one["rows"]) == without_times(other["rows"])
        assert all(torch.equal(weight, other["weights"][name]) for name, weight in one["weights"].items())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_copy_for_background_saves_takes_the_memory_that_was_predicted(base, method, capsys, monkeypatch):
    staged, copy = [], checkpoint_script.Saver.copy
    monkeypatch.setattr(checkpoint_script.Saver, "copy", lambda *given: staged.append(copy(*given)) or staged[-1])
    run(base, method=method, async_save=True, max_steps=2)
    assert "GB of the host's, a copy from which checkpoints are written" in capsys.readouterr().out
    took = sum(x.nbytes for name, x in staged[-1].items() if not name.endswith(".step"))
    config = complete(flags(base, method=method, dtype="fp32"))
    assert took == copied(config, read_config(base / "base"), None) > 0
    addresses = [{name: x.data_ptr() for name, x in copy.items() if name.startswith("weights.")} for copy in staged]
    assert len(addresses) == 2 and addresses[0] == addresses[1]  # the room of the first copy serves all


@pytest.mark.parametrize("more", [{}, {"optim": "adamw_8bit"}])
def test_the_optimizers_state_is_made_with_one_gradient_at_a_time(tiny_llama, more):
    """Before the first step, for a save; with all gradients at once a run with --optimizer_in_backward needed more memory for
    that than ever after, and more than was predicted."""
    model = tiny_llama(vocab_size=340)
    optimizer = make_optimizer(TrainConfig(method="full", **more), model)
    with Tracker() as tracker:
        checkpoint_script.make_state(model, optimizer)
    weights = list(model.parameters())
    assert len(optimizer.state) == len(weights) and all(weight.grad is None for weight in weights)
    state = sum(x.nbytes for state in optimizer.state.values() for x in state.values())
    assert tracker.live == state < tracker.peak < state + 2 * max(weight.nbytes for weight in weights)


def test_a_gpu_without_a_number_is_the_current_one():
    """torch.cuda.set_device refuses "cuda", which benchmarks/ say."""
    assert Workers(torch.device("cuda")).world == 1


def test_checkpoints_are_ordered_by_step_and_one_that_is_not_whole_is_none(tmp_path):
    for name in ("checkpoint-10", "checkpoint-8", "checkpoint-12.tmp", "checkpoint-9"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-9", "checkpoint-10"]


def test_the_checksum_of_a_large_file_is_that_of_all_its_pieces(tmp_path):
    content = bytes([1]) + bytes(2**24)  # one byte more than a piece
    (tmp_path / "file").write_bytes(content)
    assert checkpoint_script.checksum(tmp_path / "file") == zlib.crc32(content)


def test_a_kill_between_the_two_renames_of_a_save_loses_nothing(tmp_path):
    """A folder that is written once more is renamed out of the way, then the new one to its name. Killed in between, there was
    neither: the old one, still whole, was even removed by the next save before that had written anything."""
    folder, alone = tmp_path / "best", Workers(torch.device("cpu"))

    def save(text):
        with checkpoint_script.written_whole(folder, alone) as temporary:
            (temporary / "state.json").write_text(text)

    save("first")
    child = os.fork()
    if child == 0:
        rename = Path.rename
        Path.rename = lambda path, to: rename(path, to) if to.suffix == ".tmp" else os.kill(os.getpid(), signal.SIGKILL)
        save("second")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not folder.exists() and len(list(tmp_path.glob("best*.tmp"))) == 2
    harmed = tmp_path / "best.old.tmp"
    shutil.copytree(tmp_path, tmp_path.with_name("read"))
    with pytest.raises(RunError, match=r"best/state\.json cannot be read"):  # it is found, and then not what train.py writes
        checkpoint_script.read_state(tmp_path.with_name("read") / "best", torch.nn.Linear(1, 1))
    with pytest.raises(RunError, match="No space left"), checkpoint_script.written_whole(folder, alone):
        raise OSError("No space left")
    assert (folder / "state.json").read_text() == "first" and not harmed.exists()


def test_a_save_gets_its_name_when_its_files_are_on_the_disk_and_then_that_is_too(tmp_path, monkeypatch):
    """Without it, a machine that loses power soon after may have the name, and files of zeros."""
    flushed, folder = [], tmp_path / "best"
    monkeypatch.setattr(checkpoint_script, "flush_to_disk", lambda path: flushed.append((path.name, folder.exists())))
    with checkpoint_script.written_whole(folder, Workers(torch.device("cpu"))) as temporary:
        for name in ("a", "b"):
            (temporary / name).touch()
    assert sorted(flushed[:2]) == [("a", False), ("b", False)] and flushed[2:] == [(tmp_path.name, True)]


def test_a_text_that_cannot_be_written_leaves_the_one_before_and_names_the_file(tmp_path, monkeypatch):
    checkpoint_script.write_text(tmp_path / "run.json", "first")
    with pytest.raises(UnicodeEncodeError):
        checkpoint_script.write_text(tmp_path / "run.json", "\ud800")

    def full(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"run\.json could not be written: No space left on device$"):
        checkpoint_script.write_text(tmp_path / "run.json", "second")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("run.json", "first")]


def test_what_befell_a_save_is_told_at_the_end_unless_the_run_ends_for_a_reason_of_its_own(base):
    for own, told in ((None, RunError), (ZeroDivisionError(), ZeroDivisionError)):
        saver = checkpoint_script.Saver(complete(flags(base)), None, None, None, Workers(torch.device("cpu")))
        saver.writing = Future()
        saver.writing.set_exception(RunError("no room"))
        with pytest.raises(told), saver:
            if own:
                raise own


def test_the_checkpoint_before_the_first_step_resumes_too(base):
    """Found by killing: that checkpoint knew nothing of an optimizer, and a run killed before its second one could not go on;
    later, that it could, but was evaluated once more, so that the log had two rows of step 0."""
    whole = run(base, save_total_limit=0, eval_data=[str(base / "held.jsonl")])
    taken_back(base / "run", 0)
    assert [path.name for path in checkpoints(base / "run")] == ["checkpoint-0"]
    resumed = without_times(train(complete({"resume": True, "output_dir": str(base / "run")})))
    assert resumed == whole == log_of(base / "run")


def together(base, name, processes, **more) -> list[dict]:
    """The log of a run of several processes."""
    result = in_a_process(command(base, name, launcher=torchrun(processes), **more))
    assert result.returncode == 0, result.stderr
    return log_of(base / name)


def final_weights(folder) -> dict:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same_run(base, name, other):
    """The same steps over the same documents; losses to 1e-6, and weights to what that leaves after Adam's division."""
    one, two = log_of(base / name), log_of(base / other)
    for key in ("step", "supervised_tokens"):
        assert [row.get(key) for row in one] == [row.get(key) for row in two]
    assert losses(two) == pytest.approx(losses(one), rel=1e-6)
    weights = final_weights(base / other)
    for key, tensor in final_weights(base / name).items():
        torch.testing.assert_close(weights[key], tensor, rtol=1e-3, atol=1e-3)


def test_two_processes_give_the_losses_of_one_with_the_same_rows_dropout_included(base):
    """The last step of an epoch has a row for one of the two only: the other must still take part. Dropout was once drawn by
    the rank: losses were 0.4 % off, and a run resumed on another number of processes was another run."""
    more = {"max_steps": 0, "num_train_epochs": 3, "save_steps": 0, "eval_data": [str(base / "held.jsonl")], "lora_dropout": 0.3}
    together(base, "two", 2, **more)
    run(base, "one", gradient_accumulation_steps=2, **more)
    assert_same_run(base, "one", "two")
    assert json.loads((base / "two" / "run.json").read_text())["processes"] == 2


@pytest.mark.parametrize(
    "more",
    [
        {"method": "lora", "exact_match": True},
        {"method": "qlora", "cpu_offload": True},
        {"method": "full", "gradient_checkpointing": True},
        {"quantize": "int8"},
    ],
)
def test_shards_over_two_processes_give_the_run_of_one(base, more):
    more |= {"max_steps": 5, "save_steps": 0, "eval_data": [str(base / "held.jsonl")]}
    one = run(base, "one", gradient_accumulation_steps=2, **{key: x for key, x in more.items() if key != "cpu_offload"})
    sharded = together(base, "two", 2, fsdp=True, **more)
    assert_same_run(base, "one", "two")
    assert [row.get("exact_match_after") for row in one] == [row.get("exact_match_after") for row in sharded]


@pytest.mark.parametrize("more", [{}, {"fsdp": True}, {"fsdp": True, "hsdp": 2, "method": "full"}])
def test_four_processes_give_the_run_of_one(base, more):
    method = {"method": more.get("method", "lora")}
    run(base, "one", gradient_accumulation_steps=4, max_steps=4, save_steps=0, **method)
    together(base, "four", 4, max_steps=4, save_steps=0, **more)
    assert_same_run(base, "one", "four")


def test_shards_in_fp16_stay_near_the_run_of_one(base):
    one = losses(run(base, "one", gradient_accumulation_steps=2, save_steps=0, dtype="fp16"))
    assert losses(together(base, "two", 2, fsdp=True, save_steps=0, dtype="fp16")) == pytest.approx(one, rel=3e-3)


OVERFLOW_ON_RANK_1 = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import torch, train
step, calls = torch.amp.GradScaler.unscale_, []
def spoiled(self, optimizer):
    calls.append(1)
    if len(calls) == 4 and os.environ["RANK"] == "1":
        next(p.grad for group in optimizer.param_groups for p in group["params"]).to_local()[-1] = float("inf")
    return step(self, optimizer)
torch.amp.GradScaler.unscale_ = spoiled
train.main()
"""


def test_an_fp16_overflow_in_one_shard_skips_the_step_in_all(base):
    more = {"fsdp": True, "dtype": "fp16", "save_steps": 1, "save_total_limit": 0, "samples": 0}
    result = in_a_process(spoiled(base, OVERFLOW_ON_RANK_1, **more))
    assert result.returncode == 0, result.stderr
    two, three, four, five = (saved(base / "run" / f"checkpoint-{step}") for step in (2, 3, 4, 5))
    assert [state["scaler"]["scale"] for state in (three, four, five)] == [2.0**16, 2.0**15, 2.0**15]
    for before, after, moved in ((two, three, True), (three, four, False), (four, five, True)):
        same = [torch.equal(weight, after["weights"][name]) for name, weight in before["weights"].items()]
        assert not any(same) if moved else all(same)


def test_8_bit_moments_of_shards_give_nearly_the_run_of_one_and_resume_to_the_bit(base):
    """Blocks of 256 that would straddle the border of two shards are two blocks: the rounding differs, by little."""
    more = {"method": "full", "optim": "adamw_8bit", "save_steps": 3}
    one = run(base, "one", gradient_accumulation_steps=2, **more)
    sharded = together(base, "two", 2, fsdp=True, **more)
    assert losses(sharded) == pytest.approx(losses(one), rel=1e-2)
    resume = {"resume": True, "output_dir": str(taken_back(base / "two", 3))}
    with pytest.raises(RunError, match="has its 8-bit moments in other shards: resume it on as many"):
        train(complete(resume | {"fsdp": False}))
    result = in_a_process([*torchrun(2), str(REPOSITORY / "train.py"), "--resume", "--output_dir", str(base / "two")])
    assert result.returncode == 0, result.stderr
    assert log_of(base / "two") == sharded


def test_8_bit_moments_of_four_shards_and_of_two_copies_of_two_have_other_names():
    """They had the same and other sizes: resumed with another --hsdp, every rank ended in a traceback, not in one sentence."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        moment, names = torch.zeros(3), set()
        for shape in ((4,), (2, 2), (1, 4)):
            mesh = dist.init_device_mesh("cpu", shape)
            weight = DTensor.from_local(moment, mesh, [Replicate()] * (len(shape) - 1) + [Shard(0)], run_check=False)
            names.add(checkpoint_script.suffix(weight, moment))
    finally:
        dist.destroy_process_group()
    assert names == {".1of4", ".1of2x2", ".1of1x4"}


EVERY_WEIGHT = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import torch, train
step, folder = train.AdamW8bit.step, sys.argv[sys.argv.index("--output_dir") + 1]
def watched(self):
    step(self)
    weights = [p.detach() for group in self.param_groups for p in group["params"]]
    if type(weights[0]) is torch.Tensor:  # not the prediction's, which are fake
        torch.save(weights, f"{folder}-{os.environ['RANK']}.pt")
train.AdamW8bit.step = watched
train.main()
"""


def test_copies_of_a_model_stay_equal_to_the_bit_although_weights_are_rounded_by_chance(base):
    more = {"method": "full", "optim": "adamw_8bit", "pure_bf16": True, "dtype": "bf16", "save_steps": 0}
    result = in_a_process(spoiled(base, EVERY_WEIGHT, **more))
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(base / f"run-{rank}.pt") for rank in (0, 1))
    assert first[0].dtype == torch.bfloat16 and all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def two_nodes(base, name, folders, restarts=0, program=None, **more) -> list[subprocess.Popen]:
    """README's command, on two addresses of this machine: each node has its own torchrun, started in its folder, and they meet
    at the first's port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for address, folder in zip(("127.0.0.1", "127.0.0.2"), folders, strict=True):
        meeting = ("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}")
        meeting += (f"--local_addr={address}", f"--max-restarts={restarts}")
        launcher = (sys.executable, "-m", "torch.distributed.run", *meeting)
        words = spoiled(base, program, launcher, name, fsdp=True, **more)
        nodes.append(subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    return nodes


def test_two_nodes_that_share_no_disk_are_told_so_at_the_rehearsed_save(base):
    for name in ("a", "b"):
        (base / name).mkdir()
    nodes = two_nodes(base, "two", (base / "a", base / "b"), output_dir="run")
    first, second = (node.communicate(timeout=120)[1] for node in nodes)
    assert "all nodes must share the disk of --output_dir" in first + second
    assert not list(base.glob("*/run/checkpoint-*"))


@pytest.mark.parametrize(("saved_by", "resumed_by"), [(2, 1), (1, 2)])
def test_what_some_processes_saved_another_number_resumes(base, saved_by, resumed_by):
    """Every step keeps its rows, so that no document is seen twice or passed over: the supervised tokens are the same."""
    more = {"max_steps": 6, "save_steps": 3, "method": "full"}
    run(base, "whole", gradient_accumulation_steps=2, **more)
    if saved_by == 2:
        together(base, "moved", 2, fsdp=True, **more)
    else:
        run(base, "moved", gradient_accumulation_steps=2, **more)
    resume = {"resume": True, "output_dir": str(taken_back(base / "moved", 3)), "fsdp": resumed_by == 2}
    if resumed_by == 2:
        words = [word for name, value in resume.items() for word in (f"--{name}", str(value))]
        result = in_a_process([*torchrun(2), str(REPOSITORY / "train.py"), *words])
        assert result.returncode == 0, result.stderr
    else:
        train(complete(resume))
    assert_same_run(base, "whole", "moved")


def test_processes_that_cannot_share_a_steps_rows_are_refused(base):
    with pytest.raises(RunError, match="has 3 rows, which 2 processes cannot share"):
        make_plan(complete(flags(base)), None, {"rows_per_step": 3}, {"records": 0}, 1e-2, None, SimpleNamespace(world=2))


def test_the_optimizer_in_backward_is_not_resumed_where_a_process_would_have_several_rows_of_a_step(base):
    """A run of two processes that one resumed stepped every weight once for each of the two rows: its loss was 13 % off."""
    more = {"fsdp": True, "max_grad_norm": 0.0, "optimizer_in_backward": True, "max_steps": 2, "save_steps": 1}
    together(base, "run", 2, **more)
    resume = {"resume": True, "output_dir": str(taken_back(base / "run", 1)), "fsdp": False}
    with pytest.raises(RunError, match="never has the gradient of more than one a process: resume it on 2 processes"):
        train(complete(resume))


def test_processes_begun_anew_agree_on_how_often_although_each_node_counts_for_itself(monkeypatch):
    """And that although the store still names as the first one that is dead, which answers nobody."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("first", "dead")
    agent = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True, "WORLD_SIZE": 2}
    for name, value in (agent | {"RANK": 0, "TORCHELASTIC_RESTART_COUNT": 2}).items():
        monkeypatch.setenv(name, str(value))
    meet.cache_clear()
    child = os.fork()
    if child == 0:
        os.environ |= {"RANK": "1", "TORCHELASTIC_RESTART_COUNT": "1"}
        try:
            os._exit(restarts())
        finally:
            os._exit(99)
    store.wait(["dead 1"])
    agreed = restarts()
    assert (agreed, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) == (3, 3)
    meet.cache_clear()


@pytest.mark.parametrize(("nodes", "background"), [(1, False), (2, True)])
def test_a_sharded_run_whose_ranks_are_killed_restarts_by_itself_with_the_same_losses_to_the_bit(base, nodes, background):
    """torchrun's store keeps the addresses of the dead: once, restarted processes dialled those, and were refused or hung. On two
    nodes each counts the failures of its own processes only: once, one resumed, and the other began and met nobody."""
    more = {"method": "full", "max_steps": 12, "save_steps": 2, "learning_rate": 1e-3, "async_save": background}
    whole = together(base, "whole", 2, fsdp=True, **more)
    if nodes == 2:
        launched = two_nodes(base, "killed", (base, base), restarts=3, program=DIES, **more)
        results = [(node.communicate(timeout=120)[1], node.returncode) for node in launched]
    else:
        result = in_a_process(spoiled(base, DIES, torchrun(2, "--max-restarts=3"), "killed", fsdp=True, **more))
        results = [(result.stderr, result.returncode)]
    assert all(code == 0 for _, code in results), results
    assert {path.name for path in base.glob("* is to die")} == {"0 is to die", "1 is to die"}
    assert log_of(base / "killed") == whole
    weights = final_weights(base / "killed")
    assert all(torch.equal(weights[name], tensor) for name, tensor in final_weights(base / "whole").items())


def test_shards_that_were_asked_between_steps_are_saved_with_their_moments_and_resume_to_the_bit(base):
    """An evaluation has no backward pass, after which FSDP would give back the embedding, last norm and head that it gathered.
    They stayed so, were saved without moments, and a resumed run began with those of the base: its loss was 6 % off."""
    more = {"method": "full", "eval_data": [str(base / "held.jsonl")], "eval_steps": 2, "max_steps": 4, "exact_match": True}
    whole = together(base, "run", 2, fsdp=True, **more)
    weights = final_weights(base / "run")
    held = FileSystemReader(base / "run" / "checkpoint-2").read_metadata().state_dict_metadata
    assert len(held) == 4 * (2 * 9 + 3)  # two layers of nine weights, and three in none: each with two moments and a count
    resume = ["--resume", "--output_dir", str(taken_back(base / "run", 2))]
    result = in_a_process([*torchrun(2), str(REPOSITORY / "train.py"), *resume])
    assert result.returncode == 0, result.stderr
    assert log_of(base / "run") == whole
    assert all(torch.equal(weights[name], tensor) for name, tensor in final_weights(base / "run").items())


NAN_ON_RANK_1 = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import model, sizing.rehearsal, train
forward, calls = model.Llama.forward, []
def spoiled(self, *args, **kwargs):
    loss = forward(self, *args, **kwargs)
    calls.append(1)
    return loss * float("nan") if len(calls) == 3 and os.environ["RANK"] == "1" else loss
model.Llama.forward = spoiled
sizing.rehearsal.Memory.predict = lambda self: setattr(self, "line", None) or ""
train.main()
"""


def test_nan_on_one_rank_stops_all_and_names_rank_step_and_documents(base):
    result = in_a_process(spoiled(base, NAN_ON_RANK_1, max_steps=6, samples=0))
    assert result.returncode != 0
    assert "the loss is nan in step 3 on rank 1 (documents " in result.stderr
    assert "the last checkpoint stands" in result.stderr and "on rank 0" not in result.stderr


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_optimizer_in_backward_changes_no_loss_and_holds_one_gradient_at_a_time(base, method, monkeypatch):
    most = []
    original = train_script.step_in_backward

    def counted(model, optimizer):
        def count(_):
            most.append(sum(weight.grad is not None for weight in model.parameters()))

        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(count)
        original(model, optimizer)

    monkeypatch.setattr(train_script, "step_in_backward", counted)
    more = {"method": method, "max_grad_norm": 0.0, "save_steps": 0}
    plain = losses(run(base, "plain", **more))
    assert losses(run(base, "within", optimizer_in_backward=True, **more)) == plain
    assert max(most) == 1


def test_the_optimizer_in_backward_of_shards_gives_the_run_of_one(base):
    more = {"method": "full", "max_grad_norm": 0.0, "save_steps": 0, "max_steps": 4}
    run(base, "one", gradient_accumulation_steps=2, **more)
    together(base, "two", 2, fsdp=True, optimizer_in_backward=True, **more)
    assert_same_run(base, "one", "two")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"output_dir": ""}, "--output_dir is empty"),
        ({"per_device_train_batch_size": 2**25}, "a row of 2,147,483,648 tokens is more than any machine holds"),
        ({"cpu_offload": True}, "--cpu_offload is a part of --fsdp True"),
        ({"hsdp": 2}, "--hsdp is a part of --fsdp True"),
        ({"hsdp": 1, "fsdp": True}, "--hsdp 1 gives every process a whole copy, which is a run without --fsdp"),
        ({"optimizer_in_backward": True}, "never has the whole gradient: it needs --max_grad_norm 0"),
        ({"optimizer_in_backward": True, "max_grad_norm": 0.0, "gradient_accumulation_steps": 2}, "never has the whole gradient"),
    ],
)
def test_combinations_that_cannot_be_are_refused(base, more, sentence):
    with pytest.raises(RunError, match=sentence):
        run(base, **more)


@pytest.mark.parametrize(
    ("processes", "more", "sentence"),
    [
        (1, {"fsdp": True}, "--fsdp shares a model out over several processes: torchrun"),
        (8, {"fsdp": True, "hsdp": 3}, "--hsdp 3: 8 processes are not whole groups of 3"),
        (2, {"optimizer_in_backward": True, "max_grad_norm": 0.0}, "--optimizer_in_backward needs one process, or --fsdp True"),
    ],
)
def test_settings_for_other_processes_are_refused_before_the_data_is_read(base, processes, more, sentence, monkeypatch):
    (base / "data.jsonl").write_text("{")
    monkeypatch.setattr(train_script, "Workers", lambda _: SimpleNamespace(world=processes))
    with pytest.raises(RunError, match=sentence):
        run(base, **more)


def test_a_resumed_run_is_the_same_run_or_refused(base):
    run(base)
    with pytest.raises(RunError, match=r"--seed 7: the run in .* was started with 42"):
        complete({"resume": True, "output_dir": str(base / "run"), "seed": 7})
    with pytest.raises(RunError, match="nothing to resume"):
        complete({"resume": True, "output_dir": str(base / "nowhere")})
    again = complete({"resume": True, "output_dir": str(base / "run"), "logging_steps": 3})
    assert again.logging_steps == 3 and again.model_max_length == 64 and again.dtype == "fp32"


def test_a_run_goes_on_in_the_number_format_it_began_in_on_any_device(base):
    """--dtype auto is another one on another GPU: a run begun in bf16 and resumed on a T4 ended in a traceback of its scaler."""
    run(base, max_steps=1, samples=0)
    file = base / "run" / "run.json"
    file.write_text(file.read_text().replace("torch.float32", "torch.float16"))
    assert complete({"resume": True, "output_dir": str(base / "run")}).dtype == "fp16"


def test_a_run_in_fp16_goes_on_with_the_scale_of_its_loss(base):
    run(base, dtype="fp16", samples=0, save_total_limit=0)
    before, whole = (saved(base / "run" / f"checkpoint-{step}")["scaler"] for step in (4, 6))
    train(complete({"resume": True, "output_dir": str(taken_back(base / "run", 4))}))
    assert saved(base / "run" / "checkpoint-6")["scaler"] == whole != before


def test_a_run_is_not_resumed_on_other_records(base):
    """Another record anywhere gives every document another place: some would be learnt twice and others never. Others of the
    same lengths were once taken for the same, and held-out ones were not looked at: the log then compared what cannot be."""
    whole = run(base, eval_data=[str(base / "held.jsonl")])
    resume = {"resume": True, "output_dir": str(taken_back(base / "run", 4))}
    more = '{"prompt": "Where?", "response": "Mira."}\n'
    for name, change in (
        ("data", lambda t: t + more),
        ("data", lambda t: t.replace("nine", "enin")),
        ("held", lambda t: t + more),
    ):
        file = base / f"{name}.jsonl"
        records = file.read_text()
        file.write_text(change(records))
        with pytest.raises(
            RunError, match=r"began on other records than .*data\.jsonl, .*held\.jsonl gives now, or .*: resume it"
        ):
            train(complete(resume))
        file.write_text(records)
    assert losses(train(complete(resume))) == losses(whole)


@pytest.mark.parametrize("own", ['{"legacy": false, "eos_token": "<|im_end|>", "chat_template": "{{ x }}"}', "not JSON", "[1]"])
def test_others_ask_a_run_in_the_tokens_it_was_trained_in_whatever_the_bases_tokenizer_settings_are(base, tokenizer, own):
    """Llama 2's own folders say "legacy": false, by which transformers leaves out the space between <s> and [INST]."""
    for name in ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"):
        (base / "base" / name).write_text(own)
    run(base, method="full", template="guanaco")
    tokenizer.save(base, load_model(base / "base").config.max_seq_len)
    write_chat_template(base, TEMPLATES["guanaco"])
    assert (base / "run" / "tokenizer_config.json").read_text() == (base / "tokenizer_config.json").read_text()
    assert sorted(path.name for path in base.glob("run/*token*")) == ["tokenizer.model", "tokenizer_config.json"]


def test_a_finished_run_is_not_resumed_and_left_as_it_is(base, capsys, monkeypatch):
    """Nor by torchrun --max-restarts, if a rank dies after the first has written all. The last checkpoint is of step 4 of 5."""
    rows = run(base, max_steps=5, save_steps=4)
    held = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (base / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    for more in ({"resume": True}, {"resume": True, "logging_steps": 3}, flags(base, max_steps=5, save_steps=4)):
        with monkeypatch.context() as patched:
            patched.setenv("TORCHELASTIC_RESTART_COUNT", str(int("resume" not in more)))
            assert without_times(train(complete(more | {"output_dir": str(base / "run")}))) == rows
        said = capsys.readouterr().out
        assert said.startswith(f"{base / 'run'} holds the finished run, nothing is left to do") and said.count("\n") == 1
    assert held == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (base / "run").rglob("*") if path.is_file()}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # of a run that died before it had replaced the finished one
    assert complete(flags(base, overwrite=True)).overwrite
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    taken_back(base / "run", 4)  # the model was removed: the last step is done again
    assert without_times(train(complete({"resume": True, "output_dir": str(base / "run")}))) == rows
    assert (base / "run" / "adapter_model.safetensors").read_bytes() == held[base / "run" / "adapter_model.safetensors"][1]


def test_a_run_killed_between_its_last_save_and_its_last_word_is_ended_by_resume(base, monkeypatch):
    more = {"eval_data": [str(base / "held.jsonl")], "exact_match": True}
    whole = run(base, "whole", **more)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Exam, "report", killed)
        run(base, **more)
    assert (base / "run" / "adapter_model.safetensors").exists() and log_of(base / "run") != whole
    assert without_times(train(complete({"resume": True, "output_dir": str(base / "run")}))) == whole == log_of(base / "run")


def test_a_model_that_is_no_runs_is_never_written_over(base, tiny_llama):
    held = (base / "base" / "consolidated.00.pth").read_bytes()
    for overwrite in (False, True):
        with pytest.raises(RunError, match="is the folder of --model"):
            run(base, "base", overwrite=overwrite, method="full")
        save_hf(tiny_llama(vocab_size=340), base / "other")
        with pytest.raises(RunError, match="is not empty and holds no run"):
            run(base, "other", overwrite=overwrite, method="full")
    assert (base / "base" / "consolidated.00.pth").read_bytes() == held
    run(base, method="full", max_steps=1, samples=0)
    held = (base / "run" / "model.safetensors").read_bytes()
    with pytest.raises(RunError, match="is the folder of --model"):  # a run's own model, by another path
        run(base, "base/../run", model=str(base / "run"), overwrite=True)
    assert (base / "run" / "model.safetensors").read_bytes() == held


def test_files_of_others_in_the_output_folder_are_left_alone(base):
    """Once, a first run into somebody's folder cleared what looked like a run's files there: best_photos/, app_config.json."""
    (base / "home" / "best_photos").mkdir(parents=True)
    for name in ("best_photos/1.jpg", "mymodel.safetensors", "app_config.json", "samples.md", "log.jsonl"):
        (base / "home" / name).write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="is not empty and holds no run"):
            run(base, "home", overwrite=overwrite)
    run(base)
    (base / "run" / "notes_config.json").write_text("mine")
    run(base, overwrite=True)
    assert (base / "run" / "notes_config.json").read_text() == "mine"
    assert {path.read_text() for path in (base / "home").rglob("*") if path.is_file()} == {"mine"}


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"settings": {"samples": 5}}'])
def test_a_run_json_that_is_not_this_programs_is_refused(base, text):
    run(base)
    (base / "run" / "run.json").write_text(text)
    with pytest.raises(RunError, match=r"is not what train.py writes|was begun by another version"):
        complete({"resume": True, "output_dir": str(base / "run")})


def test_real_weights_need_data_of_their_own(base):
    with pytest.raises(RunError, match="needs --data"):
        complete({"model": str(base / "base")})


def test_what_a_replaced_run_had_saved_does_not_stay_beside_the_new(base):
    run(base, method="full")
    for folder in ("best", "checkpoint-98", "checkpoint-99.tmp"):
        (base / "run" / folder).mkdir()
    shards = ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
    for file in (*shards, "special_tokens_map.json", "tokenizer.json", "samples.md"):
        (base / "run" / file).write_text("")
    run(base, method="lora", samples=0, overwrite=True)
    run(base, "fresh", method="lora", samples=0)
    names = {path.name for path in (base / "run").iterdir()}
    assert "adapter_config.json" in names and names == {path.name for path in (base / "fresh").iterdir()}


RESTS_AT_STEP_3 = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import train
log_step = train.Log.step
def resting(self, step, *told, **row):
    log_step(self, step, *told, **row)
    while step == 3:
        time.sleep(0.1)
train.Log.step = resting
train.main()
"""


def test_two_runs_cannot_be_at_work_in_one_folder(base):
    with subprocess.Popen(spoiled(base, RESTS_AT_STEP_3, 1), stdout=subprocess.DEVNULL) as process:
        while not (base / "run" / "checkpoint-2").exists() and process.poll() is None:
            time.sleep(0.05)
        before = (base / "run" / "run.json").read_bytes()
        try:
            for how in ("resume", "overwrite"):
                with pytest.raises(RunError, match=r"another run is at work in .*run: name another with --output_dir"):
                    run(base, **{how: True})
        finally:
            process.kill()
    assert (base / "run" / "run.json").read_bytes() == before
    assert losses(run(base, resume=True)) == losses(run(base, "whole"))


def test_a_run_that_is_refused_does_not_take_the_folder_from_under_the_one_that_is_still_reading_its_data(base):
    with folder_script.alone_in(base / "run", SimpleNamespace(first=True)):
        for _ in range(2):
            with pytest.raises(RunError, match="another run is at work in"):
                run(base)
        assert (base / "run").is_dir()
    assert not (base / "run").exists()


def test_weights_that_are_cut_short_are_refused_before_the_data_is_read(base):
    (base / "data.jsonl").write_text("nonsense")
    weights = base / "base" / "consolidated.00.pth"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"consolidated.00.pth"):
        run(base)


def test_rows_may_be_as_long_as_the_models_window_and_no_longer(base):
    sizes = read_config(base / "base")
    for more, refused in ((0, nullcontext()), (1, pytest.raises(RunError, match="is more than the 4096 tokens"))):
        with refused:
            folder_script.check_start(complete(flags(base, model_max_length=4096 + more)), sizes, 1)


def test_a_tokenizer_of_far_fewer_tokens_than_the_model_knows_is_questioned(base, tiny_llama, capsys):
    run(base, max_steps=1, samples=0)
    assert "tokenizer has only" not in capsys.readouterr().out
    save_meta(tiny_llama(vocab_size=700), base / "base")
    run(base, max_steps=1, samples=0, overwrite=True)
    assert "the tokenizer has only 340 of the model's 700 tokens: is it this model's?" in capsys.readouterr().out


def test_a_tokenizer_that_changes_what_it_reads_is_told(base, capsys):
    run(base, max_steps=1, samples=0)
    assert "the tokenizer reads" not in capsys.readouterr().out
    file, how = base / "base" / "tokenizer", {"vocab_size": 300, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    words = iter(["The ferry leaves at nine and returns before dark."])
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=words, model_prefix=file, **how)
    run(base, max_steps=1, samples=0, overwrite=True)
    assert "the tokenizer reads 'a  b\\nﬁ' as 'a b fi', which transformers may not" in capsys.readouterr().out


def test_a_run_that_cannot_begin_leaves_no_folder_and_removes_none(base):
    (base / "data.jsonl").write_text("nonsense")
    (base / "mine").mkdir()
    for name in ("run", "mine"):
        with pytest.raises(DataError):
            run(base, name)
    assert not (base / "run").exists() and (base / "mine").exists()


def test_a_run_resumed_without_a_checkpoint_says_that_it_begins_anew(base, capsys):
    more = {"save_steps": 0, "max_steps": 1, "samples": 0}
    whole = run(base, **more)
    taken_back(base / "run", 0)
    assert "begins anew" not in capsys.readouterr().out
    assert run(base, resume=True, **more) == whole
    assert f"{base / 'run'} holds no checkpoint: the run begins anew" in capsys.readouterr().out


def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_was(base):
    run(base)
    held = {path: path.read_bytes() for path in (base / "run").rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="already holds a run: --resume goes on with it, --overwrite replaces it"):
        run(base)
    with pytest.raises(ValueError, match="no tokenizer"):  # a mistake beside --overwrite costs nothing either
        run(base, overwrite=True, tokenizer="/nowhere")
    assert held == {path: path.read_bytes() for path in (base / "run").rglob("*") if path.is_file()}
    assert losses(run(base, overwrite=True, seed=1)) == losses(log_of(base / "run"))


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_checkpoint_stands(base):
    with pytest.raises(RunError, match=r"the (loss|gradient) is (nan|inf) in step \d+.*; the last checkpoint stands"):
        run(base, learning_rate=1e18, save_steps=1, warmup_ratio=0.0, max_grad_norm=0.0, max_steps=20)
    newest = checkpoints(base / "run")[-1]
    assert saved(newest)["step"] >= 1
    assert not (base / "run" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_fills_up_in_a_save_gives_one_sentence_and_loses_nothing(base, background):
    """The limit on a file's size stands for the full disk: the system refuses to write past it, in the middle of the file."""
    run(base, max_steps=8, save_steps=4)
    before = {path: path.read_bytes() for path in (taken_back(base / "run", 4) / "checkpoint-4").iterdir()}
    program = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192));"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    words = [sys.executable, "-c", program, str(REPOSITORY / "train.py"), "--resume", "--output_dir", str(base / "run")]
    result = in_a_process([*words, "--async_save", str(background)])
    assert result.returncode == 2
    assert result.stderr.startswith("train.py: could not write") and result.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in (base / "run" / "checkpoint-4").iterdir()} == before
    assert [path.name for path in (base / "run").glob("checkpoint-*")] == ["checkpoint-4"]
    resumed = without_times(train(complete({"resume": True, "output_dir": str(base / "run")})))
    assert losses(resumed)[-1] == losses(log_of(base / "run"))[-1]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_save_that_fails_in_the_background_stops_the_run_before_the_next_save(base, processes):
    """At the step that ends next, and the checkpoint before it stands."""
    more = {"max_steps": 10**6, "logging_steps": 1, "save_steps": 4, "async_save": True, "fsdp": processes > 1, "samples": 0}
    result = in_a_process(spoiled(base, NO_ROOM_AT_STEP_8, torchrun(2) if processes > 1 else 1, **more))
    assert result.returncode != 0
    assert re.search(r"train.py: could not write .*/checkpoint-8, and .*; what was there stands: No space left", result.stderr)
    assert [path.name for path in checkpoints(base / "run")] == ["checkpoint-0", "checkpoint-4"]
    assert log_of(base / "run")[-1]["step"] < 12 and saved(base / "run" / "checkpoint-4")["step"] == 4


@pytest.mark.parametrize(("method", "writer"), [("lora", "save_adapter"), ("full", "save_hf")])
def test_a_final_save_that_reads_back_otherwise_is_not_put_in_place(base, method, writer, monkeypatch):
    original = getattr(folder_script, writer)

    def damaged(model, folder, *args, **options):
        original(model, folder, *args, **options)
        path = next(folder.glob("*.safetensors"))
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))

    monkeypatch.setattr(folder_script, writer, damaged)
    with pytest.raises(RunError, match="is not what was written: is the disk sound"):
        run(base, method=method, max_steps=2)
    assert not list((base / "run").glob("*.safetensors")) and (base / "run" / "checkpoint-2").exists()


def test_weights_that_are_not_finite_are_not_saved_and_not_blamed_on_the_disk(base, monkeypatch):
    step = train_script.training_step

    def harmful(config, model, *args):
        result = step(config, model, *args)
        model.norm.weight.data[0] = math.nan
        return result

    monkeypatch.setattr(train_script, "training_step", harmful)
    with pytest.raises(RunError, match="holds NaN or infinity after the last step, and is not saved"):
        run(base, method="full", max_steps=1)
    assert not list((base / "run").glob("*.safetensors"))


ASKED_TO_STOP = """
import os, signal, sys, time
sys.path.insert(0, sys.argv.pop(1))
import train
number, row_seed, note, noted = signal.Signals[sys.argv.pop(1)], train.row_seed, train.StopSignal.note, []
def asking(seed, step, row):
    if step == 7 and row == 0:
        agent = os.getppid()  # of several processes
        to = {"1": os.getpid(), "2": agent}[os.environ.get("WORLD_SIZE", "1")]
        os.killpg(os.getpgid(agent), number) if to == agent and number == signal.SIGINT else os.kill(to, number)
        while not noted:
            time.sleep(0.01)
    return row_seed(seed, step, row)
def noting(self, *given):
    noted.append(1)
    note(self, *given)
train.row_seed, train.StopSignal.note = asking, noting
train.main()
"""


@pytest.mark.parametrize(
    ("processes", "number", "background"),
    [(1, "SIGINT", False), (1, "SIGTERM", False), (1, "SIGTERM", True), (2, "SIGINT", False), (2, "SIGTERM", True)],
)
def test_a_run_asked_to_stop_finishes_its_step_saves_and_exits_0(base, processes, number, background):
    """A Ctrl-C goes to all that the terminal began. The ranks of torchrun have sessions of their own: it passes the signal on,
    once, and itself ends as one that was interrupted."""
    more = {"max_steps": 10, "save_steps": 5, "gradient_accumulation_steps": 3 - processes}
    words = spoiled(base, ASKED_TO_STOP, torchrun(2) if processes == 2 else 1, async_save=background, **more)
    words.insert(words.index(str(REPOSITORY)) + 1, number)
    result = in_a_process(words, start_new_session=True)
    assert "after step 7 of 10, it is saved: --resume" in result.stderr
    assert processes == 2 or (result.returncode == 0 and "Traceback" not in result.stderr)
    assert [path.name for path in checkpoints(base / "run")] == ["checkpoint-5", "checkpoint-7"]
    resumed = losses(train(complete({"resume": True, "output_dir": str(base / "run")})))
    if processes == 1:
        assert resumed == losses(run(base, "whole", **more))
    else:
        assert resumed == pytest.approx(losses(run(base, "whole", **more | {"gradient_accumulation_steps": 2})), rel=1e-6)


NO_ROOM_AT_STEP_8 = """
import os, sys, threading, time
sys.path.insert(0, sys.argv.pop(1))
import running.checkpoint, train
write_text, log_step, fails = running.checkpoint.write_text, train.Log.step, threading.Event()
def failing(path, text):
    if path.parent.name == "checkpoint-8.tmp":
        fails.set()
        raise OSError("No space left")
    write_text(path, text)
def slow(self, step, *told, **row):
    log_step(self, step, *told, **row)
    if step == 9 and self.workers.first:
        fails.wait(60)
        time.sleep(1)  # its folder is cleared away
running.checkpoint.write_text, train.Log.step = failing, slow
train.main()
"""


RANK_1_FAILS = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import train
if os.environ["RANK"] == "1":
    def failing(*_):
        raise OSError("the disk of the second node is gone")
    train.read_data = failing
train.main()
"""


def test_one_rank_that_fails_ends_all_with_its_message(base):
    result = in_a_process(spoiled(base, RANK_1_FAILS))
    assert result.returncode != 0 and not (base / "run").exists()
    assert "train.py: rank 1: the disk of the second node is gone" in result.stderr


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_turns_read_only_in_a_run_gives_one_sentence_and_loses_nothing(base, background):
    """A disk with errors is mounted anew by Linux, read-only; here a folder is, in a namespace of its own."""
    folder, more = base / "run", {"max_steps": 10**6, "logging_steps": 10**6, "save_steps": 4, "async_save": background}
    folder.mkdir()
    script = (
        f"mount --bind {folder} {folder} && {{ timeout 100 sh -c 'until [ -e {folder}/checkpoint-4 ]; do sleep 0.01; done; "
        f"until mount -o remount,ro,bind {folder}; do :; done' & }} && exec {' '.join(command(base, **more))}"
    )
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    result = in_a_process(["unshare", "--mount", "sh", "-c", script])
    assert result.returncode == 2, result.stderr
    said = result.stderr.splitlines()[-1]
    assert re.match(r"train\.py: could not (write .* what was there stands|remove .* the newer ones stand): .*Read-only", said)
    stopped = int(checkpoints(folder)[-1].name.split("-")[1])
    assert stopped >= 4
    state = saved(folder / f"checkpoint-{stopped}")
    assert state["step"] == stopped and all(weight.isfinite().all() for weight in state["weights"].values())


def flip_a_byte(folder):
    path = next(folder.glob("*.distcp"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change_state(folder, **fields):
    path = folder / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (flip_a_byte, r"\.distcp is not as it was written, its checksum differs; without its folder, --resume takes the"),
        (lambda folder: next(folder.glob("*.distcp")).unlink(), r"\.distcp is missing; without its folder"),
        (lambda folder: (folder / ".metadata").unlink(), r"\.metadata is missing; without its folder"),
        (lambda folder: (folder / "state.json").unlink(), r"state\.json is missing; without its folder"),
        (lambda folder: (folder / "state.json").write_text("{"), r"state\.json cannot be read"),
        (lambda folder: change_state(folder, format=99), "is in format 99 of a newer train.py; this one reads 1"),
        (lambda folder: change_state(folder, shapes={}), "holds other weights than this run trains"),
    ],
)
def test_a_broken_checkpoint_is_refused_by_name_and_the_one_before_it_resumes(base, harm, sentence):
    whole = run(base, max_steps=6)
    harm(taken_back(base / "run", 6) / "checkpoint-6")
    with pytest.raises(RunError, match=sentence):
        train(complete({"resume": True, "output_dir": str(base / "run")}))
    taken_back(base / "run", 4)
    assert losses(train(complete({"resume": True, "output_dir": str(base / "run")}))) == losses(whole)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"methode": "lora"}, "unknown argument --methode, did you mean --method"),
        ({"method": "lorra"}, "invalid choice: 'lorra' (choose from"),
        ({"template": "chatml"}, "unknown template 'chatml': known are llama2, alpaca, plain"),
        ({"lora_targets": "wx"}, "unknown LoRA target wx: known are all-linear, output, tok_embeddings, w1"),
        ({"model_max_length": 0}, "--model_max_length must be at least 1, not 0"),
        ({"max_steps": "ten"}, "invalid int value: 'ten'"),
        ({"num_train_epochs": "inf"}, "--num_train_epochs must be above 0 and finite, not inf"),
        ({"learning_rate": "inf"}, "--learning_rate must be 0 or more and finite, not inf"),
        ({"weight_decay": "inf"}, "--weight_decay must be 0 or more and finite, not inf"),
        ({"adam_epsilon": 1e-60}, "--adam_epsilon must be at least 1e-30"),
        ({"lora_rank": 10**5}, "a rank of 100000 is more than any 32 x 32 matrix has"),
        ({"seed": 2**64}, "--seed must be at least 0 and below 2 ** 64, not 18446744073709551616"),
        ({"model": "/nowhere"}, "no model at /nowhere: it is not a folder"),
        ({"model_max_length": 5000}, "is more than the 4096 tokens the model was trained to read"),
        ({"eval_split": 0.99}, "--eval_split 0.99 of 30 records leaves none to train on"),
        ({"data": "/nowhere.jsonl"}, "/nowhere.jsonl cannot be read"),
        ({"exact_match": True}, "--exact_match needs held-out records"),
        ({"load_best_model_at_end": True}, "--load_best_model_at_end needs held-out data"),
        ({"resume": True}, "nothing to resume"),
        ({"fsdp": True, "data": "/nowhere.jsonl"}, "--fsdp shares a model out over several processes: torchrun"),
    ],
)
def test_a_users_mistake_gets_one_sentence_and_exit_code_2(base, more, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", command(base, **more)[1:])
    with pytest.raises(SystemExit) as stopped:
        train_script.main()
    shown = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in shown and shown.count("\n") == 1
    assert not (base / "run").exists()


def test_a_run_on_cached_tokens_weights_and_a_template_of_ones_own(base, tmp_path, monkeypatch):
    """The second run finds the tokens of the first; the template travels in run.json to generate.py, its file gone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("preparing.cache.CACHE_FROM", 1)
    own = base / "mine.json"
    own.write_text('{"user": "Q: {user}", "assistant": "{assistant}"}')
    more = {"data": [f"{base / 'data.jsonl'}:2"], "template": str(own), "max_steps": 2, "eval_split": 0.2, "overwrite": True}
    first = [row["loss"] for row in run(base, **more) if "loss" in row]
    assert len(first) == 2
    (fates,) = (tmp_path / "nanotune").glob("*/fates.json")
    assert json.loads(fates.read_text())["kept"] == 2 * 24  # of 30, 6 are held out
    monkeypatch.setattr("preparing.cache.write_tokens", None)
    assert [row["loss"] for row in run(base, **more) if "loss" in row] == first
    own.unlink()
    _, _, template = load(GenerateConfig(adapter=(str(base / "run"),), device="cpu"))
    assert template.user == "Q: {user}"


def test_a_bad_record_stops_the_run_before_it_starts(base):
    lines = (base / "data.jsonl").read_text().splitlines()
    lines[16] = lines[16][:-5]
    (base / "data.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"data\.jsonl, line 17: not JSON"):
        run(base)
    assert not (base / "run").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(base, tiny_llama):
    save_meta(tiny_llama(vocab_size=100), base / "base")
    with pytest.raises(ValueError, match=r"has 340 tokens, the model in .* knows 100"):
        run(base)


def test_progress_in_a_file_is_plain_lines(base):
    result = in_a_process(command(base, logging_steps=3))
    assert result.returncode == 0, result.stderr
    assert "\r" not in result.stdout and "\033" not in result.stdout
    assert [line.split()[1] for line in result.stdout.splitlines() if line.startswith("step ")] == ["3/6", "6/6"]


def test_the_log_has_the_last_step_and_the_speed_since_the_row_before(tmp_path):
    log = folder_script.Log(SimpleNamespace(output_dir=tmp_path, logging_steps=2), [], 3, Workers(torch.device("cpu")))
    for step, seconds in ((1, 1.0), (2, 1.0), (3, 4.0)):
        log.step(step, 100, seconds, loss=1.0)
    assert [(row["step"], row["tokens_per_second"]) for row in log.rows] == [(2, 100.0), (3, 25.0)]


# ---------------------------------------------------------------------------------------------------------------------
# Beside transformers and PEFT


@pytest.mark.live
def test_what_a_run_saved_opens_in_transformers_and_peft_with_the_same_logits(base):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    tokens = torch.arange(3, 40)
    run(base, "full", method="full")
    whole = transformers.AutoModelForCausalLM.from_pretrained(base / "full")
    mine = load_model(base / "full")
    torch.testing.assert_close(whole(tokens[None]).logits[0], mine(tokens), rtol=0, atol=1e-4)

    run(base, "lora", model=str(base / "full"), tokenizer=str(base / "base" / "tokenizer.model"))
    adapted = peft.PeftModel.from_pretrained(whole, base / "lora")
    mine = load_adapter(mine, base / "lora", partial(from_hf, config=mine.config))
    torch.testing.assert_close(adapted(tokens[None]).logits[0], mine(tokens), rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def test_a_run_says_what_it_will_need_and_how_far_off_that_was(base, capsys):
    run(base, max_steps=3)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory:")]
    assert len(said) == 2 and "predicted at the peak" in said[0] and "counted in the first two steps" in said[1]
    error = float(said[1].rsplit(", ", 1)[1].split("%")[0])
    assert 0 <= error <= 10  # predicted for the row with the most labels, which the first two steps need not meet


@pytest.mark.parametrize("settings", [{"attention": "textbook"}, {"dtype": "bf16"}], ids=["all scores", "in blocks"])
def test_what_a_run_will_need_is_of_its_documents_not_of_one_as_long_as_a_row(settings, base, capsys):
    """The scores of attention are a square of each document. As one of a whole row they were 129 % too many."""
    run(base, max_steps=2, samples=0, method="full", model_max_length=512, **settings)
    error = float(capsys.readouterr().out.rsplit("predicted, ", 1)[1].split("%")[0])
    assert 0 <= error <= 10


@pytest.mark.parametrize(("free", "said"), [(10**5, True), (10**12, False)])
def test_a_run_that_does_not_fit_into_this_machines_memory_says_so_before_it_begins(base, monkeypatch, capsys, free, said):
    """Linux ends a process that takes more than there is, without a word."""
    for place in ("sizing.rehearsal", "sizing.advice"):
        monkeypatch.setattr(f"{place}.free_memory", lambda: free)
    run(base, max_steps=1, samples=0)
    out = capsys.readouterr().out
    assert ("warning: that does not fit in the 0.00 GB that are free here: a peak of 0.00 GB was predicted" in out) == said
    assert ("  no    --gradient_checkpointing True" in out) == said


def test_what_is_free_of_this_machines_memory_is_what_linux_says():
    free = free_memory()
    if not Path("/proc/meminfo").exists():
        assert free == math.inf
    else:
        assert 0 < free < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_running_out_of_memory_is_explained(base, monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_script, "training_step", out_of_memory)
    monkeypatch.setattr(Memory, "predict", lambda self: setattr(self, "line", None) or "")
    with pytest.raises(RunError, match=r"out of memory: .* was predicted, most of it .*(\n.*)+--gradient_checkpointing"):
        run(base)
