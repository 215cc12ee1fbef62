"""memory.py: what is predicted is what is counted, the arithmetic agrees with both, and every question gets an answer."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import memory
from helping.flags import parse_flags, with_tuples
from memory import Block, Tracker, predict, timeline, watch
from model import PRESETS, ModelConfig
from sizing.advice import advice, cheaper, needed, sharded
from sizing.formula import KEPT, formula, simulated
from sizing.gpu import GPU, GPUS, CachingAllocator, find_gpu
from sizing.pages import layer_rows, within
from sizing.rehearsal import Rehearsal
from sizing.shards import processes
from train import TrainConfig

REPOSITORY = Path(__file__).resolve().parent.parent
SIZES = ModelConfig(dim=64, n_layers=6, n_heads=4, n_kv_heads=2, hidden_dim=120, vocab_size=96)
QLORA = {"method": "qlora", "quantize": "nf4"}
FULL = {"method": "full"}
PURE = {"method": "full", "optim": "adamw_8bit", "pure_bf16": True}
AGAIN = {"gradient_checkpointing": True}
WITHIN = {"optimizer_in_backward": True, "max_grad_norm": 0.0}
RUNS = {
    "lora": {},
    "lora-16-bit": {"dtype": "bf16"},
    "lora-fp16": {"dtype": "fp16"},
    "lora-checkpointing": AGAIN,
    "lora-accumulation": {"gradient_accumulation_steps": 2},
    "lora-8-bit-adamw": {"optim": "adamw_8bit"},
    "lora-dropout": {"lora_dropout": 0.1, "lora_targets": ("wq", "tok_embeddings", "output")},
    "lora-textbook": {"attention": "textbook"},
    "qlora": QLORA,
    "qlora-checkpointing": QLORA | AGAIN | {"dtype": "bf16"},
    "int8": {"quantize": "int8"},
    "full": FULL,
    "full-masters": FULL | {"dtype": "bf16"},
    "full-checkpointing": FULL | AGAIN | {"dtype": "bf16"},
    "full-fp16": FULL | {"dtype": "fp16"},
    "full-pure-bf16": PURE,
    "full-in-backward": FULL | WITHIN,
    "full-pure-bf16-in-backward": PURE | AGAIN | WITHIN,
    "qlora-in-backward": QLORA | WITHIN,
}


def rehearsal(flags: dict, sizes: ModelConfig, tokens: int = 64, gpu: GPU | None = None, processes: int = 1) -> Rehearsal:
    config = TrainConfig(**{"device": "cpu", "model_max_length": tokens} | flags)
    return Rehearsal(config, sizes, torch.device("cpu"), gpu, processes=processes)


def as_plain(line) -> list[tuple]:
    return [(phase.part, phase.name, +phase.start, +phase.peak, +phase.end) for phase in line.phases]


def memory_py(*arguments: str) -> SimpleNamespace:
    """The program, in this process: one that imports PyTorch again takes seconds."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["memory.py", *arguments])
        try:
            memory.main()
        except SystemExit as ended:
            code = ended.code
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue(), returncode=code)


# The tracker


@pytest.fixture(params=["real", "fake"])
def tracker(request):
    if request.param == "fake":
        with FakeTensorMode(), Tracker() as tracker:
            yield tracker
    else:
        with Tracker() as tracker:
            yield tracker


def test_a_storage_is_counted_once_however_many_views_it_has_and_until_the_last_is_gone(tracker):
    x = torch.empty(1000)
    views = [x[10:], x.view(10, 100).T, x.detach()]
    assert tracker.live == 4000
    del x
    assert tracker.live == 4000
    del views
    assert (tracker.live, tracker.peak) == (0, 4000)


def test_work_in_place_adds_nothing(tracker):
    x = torch.zeros(1000)
    x.add_(1).mul_(2)
    assert tracker.live == tracker.peak == 4000


def test_what_backward_will_need_is_alive_until_it_ran(tracker):
    x = torch.ones(1000, requires_grad=True)
    y = (x.exp() * 2).sum()  # exp keeps its result, the product with a number nothing
    assert tracker.live == 4000 + 4000 + 4
    y.backward()
    assert tracker.live == 4000 + 4000 + 4  # the gradient instead


def test_a_tensor_that_is_kept_raises_the_count(tracker):
    """The control: a count that never rose would pass the tests above that compare one count with another."""
    kept = []
    for i in range(3):
        kept.append(torch.empty(250))
        assert tracker.live == 1000 * (i + 1)


def test_scratch_of_a_kernel_raises_the_peak_and_is_gone():
    with Tracker({"aten::exp": lambda x: 5000}) as tracker:
        torch.empty(1000).exp()
    assert tracker.peak == 4000 + 4000 + 5000 and tracker.live == 0


def test_flash_attentions_backward_takes_room_for_each_document():
    tokens, config = 256, TrainConfig(device="cpu", dtype="bf16", model_max_length=256)
    for documents in (100, 200):  # so many that the peak is there
        run = Rehearsal(config, SIZES, torch.device("cpu"), GPUS["h100"], documents=documents)
        found = predict(run).highest.peak["kernel scratch"]
        assert found == (tokens + 128 * documents) * SIZES.n_heads * (32 + 1) * 4


def test_the_allocator_takes_segments_cuts_them_and_joins_what_is_free():
    allocator, mib = CachingAllocator(), 2**20
    small, large, middle = Block(100, ""), Block(43 * mib, ""), Block(4 * mib, "")
    allocator.allocate(small)
    assert (allocator.allocated, allocator.reserved) == (512, 2 * mib)
    allocator.allocate(large)  # a segment of 44 MiB; the rest of 1 MiB is not cut off
    assert (allocator.allocated, allocator.reserved) == (512 + 44 * mib, 46 * mib)
    allocator.free(large)
    allocator.allocate(middle)  # out of the free segment
    allocator.allocate(large)
    assert allocator.reserved == (46 + 44) * mib
    allocator.free(middle)
    twin = Block(44 * mib, "")
    allocator.allocate(twin)  # fits only if the two halves were joined again
    assert allocator.reserved == (46 + 44) * mib


# Prediction


@pytest.mark.parametrize("name", RUNS)
def test_the_prediction_is_the_count_of_the_real_run_to_the_byte(name):
    """Every phase of two steps, an evaluation and a save, and every kind in it; so the peak as well."""
    sizes = replace(SIZES, n_layers=3)
    real, fake = (watch(rehearsal(RUNS[name], sizes), dry) for dry in (False, True))
    assert as_plain(timeline(real.diary)) == as_plain(timeline(fake.diary))
    assert real.peak == fake.peak == timeline(fake.diary).peak > 10**5


DEEP = ["lora-accumulation", "qlora-checkpointing", "full-masters", "full-pure-bf16", "full-pure-bf16-in-backward"]


@pytest.mark.parametrize("name", DEEP)
def test_a_deep_model_follows_from_five_of_its_layers_to_the_byte(name):
    run = rehearsal(RUNS[name], replace(SIZES, n_layers=8))
    assert as_plain(predict(run)) == as_plain(timeline(watch(run, True).diary))


@pytest.mark.parametrize("flags", [QLORA | AGAIN, FULL, PURE])
def test_what_the_allocator_reserves_for_a_deep_model_follows_as_well(flags):
    """To the byte, as if it had handed out and taken back every block of every layer."""
    gpu = GPUS["a100-80"]
    run = rehearsal({"dtype": "bf16"} | flags, replace(PRESETS["125m"], n_layers=8), 512, gpu)
    deep, followed = timeline(watch(run, True).diary, gpu), predict(run)
    assert (followed.peak, followed.tails, followed.reserved) == (deep.peak, deep.tails, deep.reserved)
    assert followed.reserved > followed.peak


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("flags", [QLORA | AGAIN, FULL | {"dtype": "bf16"}])
def test_many_rows_in_a_step_need_what_the_three_rehearsed_need(flags, count, monkeypatch):
    run = rehearsal(flags | {"gradient_accumulation_steps": 5}, replace(SIZES, n_layers=2), processes=count)
    three = as_plain(predict(run))
    monkeypatch.setattr("sizing.rehearsal.ROWS", 5)
    five = as_plain(predict(run))
    assert len(three) < len(five) and all(phase in three for phase in five)


def test_on_a_gpu_every_phase_is_measured_by_the_allocators_own_figures(monkeypatch):
    highest = iter(range(10**6))
    figures = {"memory_allocated": 5, "memory_reserved": 7, "reset_peak_memory_stats": None, "empty_cache": None}
    for name, figure in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda figure=figure: figure)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(highest))
    measured = memory.measure(rehearsal({}, SIZES), torch.device("cuda"))
    counted = memory.measure(rehearsal({}, SIZES), torch.device("cpu"))
    assert [(phase.part, phase.name) for phase in measured.phases] == [(phase.part, phase.name) for phase in counted.phases]
    assert measured.highest is measured.phases[-1] and measured.peak == len(measured.phases) - 1
    assert measured.reserved == 7 and simulated(measured, SIZES.n_layers)["allocated peak"] == measured.peak


def test_fewer_labels_make_a_smaller_prediction_as_they_make_a_smaller_run():
    sizes = replace(SIZES, n_layers=2, vocab_size=4000)
    few = rehearsal({}, sizes)
    few.row["labels"][20:] = -100
    few.supervised = 20
    assert timeline(watch(few, True).diary).peak == timeline(watch(few, False).diary).peak
    assert timeline(watch(few, True).diary).peak < timeline(watch(rehearsal({}, sizes), True).diary).peak


SHARDED = {
    "lora": {"fsdp": True},
    "qlora": QLORA | AGAIN | {"fsdp": True, "dtype": "bf16", "gradient_accumulation_steps": 2},
    "full": FULL | {"fsdp": True},
    "full-16-bit": FULL | AGAIN | {"fsdp": True, "dtype": "bf16"},
    "ddp-lora": {"gradient_accumulation_steps": 2},
    "ddp-full": FULL | {"dtype": "bf16"},
    "full-in-backward": FULL | WITHIN | {"fsdp": True},
}
ON_TWO = """
import dataclasses, json, time
import torch, torch.distributed as dist
import memory
from test_memory import SHARDED, SIZES, as_plain, rehearsal
from train import Workers

def lets_go(send):  # gloo's thread keeps what was sent until it comes round to look
    def wrapped(*args, **more):
        result = send(*args, **more)
        time.sleep(0.01)
        return result
    return wrapped

for name in ("all_gather_single", "reduce_scatter_single", "all_reduce"):
    setattr(dist, name, lets_go(getattr(dist, name)))
workers, found = Workers(torch.device("cpu")), {}
for name, flags in SHARDED.items():
    run = rehearsal(flags, dataclasses.replace(SIZES, n_layers=3), processes=2)
    real = [memory.measure(run, torch.device("cpu")) for _ in range(4)]
    if workers.rank == 0:  # beside the real group, as train.py does it
        found[name] = [(line.peak, as_plain(line)) for line in (memory.predict(run), *real)]
    dist.barrier()
if workers.rank == 0:
    print(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    """{run: [(peak, phases) predicted, and four times counted on real tensors in one of two processes that talk over gloo]}"""
    script = tmp_path_factory.mktemp("two") / "on_two.py"
    script.write_text(ON_TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SHARDED)
def test_the_prediction_of_a_sharded_run_is_the_count_of_a_real_one_on_two_processes(name, on_two):
    """Peak and every phase, FSDP's gathering, prefetching and reducing included. gloo's thread may let go of a buffer a moment
    later, which only ever adds: the least of four counts is compared. Allowed are the few bytes of a sum over the processes (a
    loss, DDP's order of buckets), in saving the last weight that was gathered whole, and in DDP's loading the copies with which
    it makes the weights of all processes equal."""
    (predicted, fake), *counts = on_two[name]
    assert min(peak for peak, _ in counts) == pytest.approx(predicted, abs=512) and predicted > 10**5
    for phase, *real in zip(fake, *(phases for _, phases in counts), strict=True):
        assert all(count[:2] == phase[:2] for count in real)
        if phase[0] != "save" and (phase[0] != "load" or not name.startswith("ddp")):
            for moment in (2, 3, 4):  # start, peak, end
                least = min(sum(count[moment].values()) for count in real)
                assert least == pytest.approx(sum(phase[moment].values()), abs=512), (phase, real)


COPIES = {"fsdp": True, "hsdp": 2, "gradient_accumulation_steps": 2}
ON_FOUR = [*(SHARDED[name] for name in ("qlora", "full-16-bit", "ddp-lora", "ddp-full")), COPIES, PURE | COPIES]


@pytest.mark.parametrize("flags", ON_FOUR)
def test_a_deep_model_on_several_gpus_follows_from_five_of_its_layers_to_the_byte(flags):
    run = rehearsal(flags, replace(SIZES, n_layers=8), processes=4)
    with processes(4):
        deep = timeline(watch(run, True).diary)
    assert as_plain(predict(run)) == as_plain(deep)


def test_what_waits_in_the_hosts_memory_is_not_on_the_gpu():
    """Offload cannot be counted on real tensors of a CPU, where both memories are one. So, beside the same run without it: what
    stays is gone, and in the block at work nothing else has changed."""
    here = predict(rehearsal(FULL | AGAIN | {"fsdp": True, "dtype": "bf16"}, SIZES, processes=2))
    away = predict(rehearsal(FULL | AGAIN | {"fsdp": True, "dtype": "bf16", "cpu_offload": True}, SIZES, processes=2))
    kept = {kind: max(phase.peak[kind] for phase in here.phases if phase.part != "load") for kind in KEPT}
    assert away.host == pytest.approx(sum(kept.values()), rel=0.01)
    assert not any(phase.peak[kind] for phase in away.phases for kind in KEPT)
    blocks = [next(p for p in line.phases if (p.part, p.name) == ("second step", "backward 4")) for line in (here, away)]
    gathered, other = ([p.peak[kind] for p in blocks] for kind in ("gathered weights", "temporary"))
    assert gathered[0] == gathered[1] > 0 and other[1] == pytest.approx(other[0], rel=0.01)


TEXTBOOK = {"attention": "textbook"}
SHARDS = {"fsdp": True}
ROWS = {"gradient_accumulation_steps": 2}
DROP = {"lora_dropout": 0.1}
ONE_BY_ONE = {"dtype": "fp16"}  # a T4, which attends to one document after the other
OUTER = {"lora_targets": ("wq", "tok_embeddings", "output"), "lora_rank": 64}
COMPARED = [  # preset, flags, tokens, processes
    ("7b", {}, 2048, 1),
    ("1b", AGAIN, 1024, 1),
    ("7b", QLORA, 1024, 1),
    ("7b", QLORA | AGAIN, 2048, 1),
    ("70b", QLORA | AGAIN, 4096, 1),
    ("1b", {"quantize": "int8"} | AGAIN, 2048, 1),
    ("1b", OUTER, 512, 1),
    ("1b", {"dtype": "fp32"}, 1024, 1),
    ("1b", ROWS, 1024, 1),
    ("1b", ROWS | {"lora_rank": 256}, 1024, 2),  # the second row's gradients are added and go one by one
    ("1b", ROWS | FULL, 4096, 1),
    ("1b", {"lora_targets": ("w1", "w2", "w3")}, 2048, 1),  # attention keeps nothing in the first layer
    ("7b", {"lora_targets": ("all-linear", "output"), "lora_rank": 256}, 1024, 1),
    ("13b", {"quantize": "int8", "lora_rank": 256, "optim": "adamw_8bit"} | AGAIN, 1024, 1),  # the peak is at the first layer
    ("1b", OUTER | WITHIN, 1024, 1),
    ("1b", {"lora_targets": ("wq", "wv"), "lora_rank": 64}, 2048, 1),
    ("125m", OUTER | {"dtype": "fp32"}, 512, 1),
    ("125m", OUTER, 256, 1),  # one chunk of the loss
    ("1b", AGAIN | {"lora_targets": ("output",), "lora_rank": 64}, 2048, 1),  # no block has a backward
    ("125m", FULL, 256, 1),
    ("7b", FULL, 512, 1),
    ("7b", FULL, 2048, 1),
    ("1b", FULL, 2048, 1),
    ("7b", FULL | AGAIN, 2048, 1),
    ("1b", FULL | AGAIN, 4096, 1),
    ("1b", PURE, 4096, 1),
    ("7b", PURE, 2048, 1),  # a block's backward is most while flash attention's is at work
    ("7b", PURE | AGAIN, 2048, 1),
    ("7b", PURE | AGAIN | WITHIN, 2048, 1),
    ("1b", FULL | WITHIN, 2048, 1),
    ("1b", TEXTBOOK, 1024, 1),
    ("7b", TEXTBOOK | {"lora_rank": 64}, 2048, 1),
    ("1b", TEXTBOOK | AGAIN | QLORA, 4096, 1),
    ("1b", TEXTBOOK | FULL, 2048, 1),
    ("7b", TEXTBOOK | PURE | AGAIN, 4096, 1),
    ("1b", AGAIN | SHARDS, 2048, 8),
    ("1b", SHARDS, 512, 8),  # the peak is in forward
    ("1b", AGAIN | SHARDS | {"hsdp": 2}, 2048, 4),
    ("1b", QLORA | AGAIN | SHARDS | {"cpu_offload": True}, 2048, 2),
    ("1b", QLORA | AGAIN | SHARDS | {"lora_rank": 256}, 2048, 2),  # gradients of adapters that count
    ("1b", FULL | AGAIN | SHARDS, 2048, 8),
    ("1b", PURE | AGAIN | SHARDS, 2048, 8),
    ("1b", PURE | AGAIN | SHARDS | {"cpu_offload": True}, 2048, 2),
    ("1b", PURE | AGAIN | WITHIN | SHARDS, 2048, 8),
    ("1b", FULL | AGAIN, 2048, 4),
    ("7b", PURE, 512, 2),
    ("1b", PURE | AGAIN | ROWS, 1024, 2),
    ("70b", PURE | AGAIN | ROWS | TEXTBOOK, 2048, 2),  # the peak is in forward
    ("70b", PURE | AGAIN | ROWS | TEXTBOOK, 8192, 2),  # in the first row's backward
    ("70b", FULL | AGAIN | {"gradient_accumulation_steps": 3} | TEXTBOOK, 4096, 4),  # in the second's
    ("125m", FULL | SHARDS, 256, 8),  # where what is in no block is reduced
    ("7b", FULL | SHARDS | {"optim": "adamw_8bit"}, 256, 8),  # the loss: a block's part is rounded
    ("1b", SHARDS | {"lora_rank": 256, "cpu_offload": True}, 256, 2),  # a block's part is brought from the host
    ("1b", PURE | WITHIN | SHARDS, 512, 3),
    ("1b", PURE | AGAIN | SHARDS | {"hsdp": 4}, 1024, 8),  # sums over the copies stay to the end of backward
    ("1b", FULL | ROWS | SHARDS | {"hsdp": 2}, 1024, 4),
    ("1b", PURE | AGAIN | SHARDS | {"hsdp": 4, "cpu_offload": True}, 1024, 8),
    ("7b", DROP, 2048, 1),
    ("7b", QLORA | AGAIN | DROP, 1024, 1),
    ("1b", QLORA | DROP | {"lora_targets": ("all-linear", "output")}, 2048, 1),
    ("1b", {"dtype": "fp32", "lora_targets": ("all-linear", "output")} | DROP, 1024, 1),
    ("1b", {"quantize": "int8", "lora_targets": ("wq", "wv")} | AGAIN | DROP, 512, 1),
    ("1b", TEXTBOOK | DROP | {"lora_targets": ("wv", "w1", "w3")}, 2048, 1),  # softmax is kept for v's gradient alone
    ("125m", TEXTBOOK | {"lora_targets": ("wq",)}, 1024, 1),
    ("1b", {"lora_targets": ("wo",)}, 2048, 1),  # of attention only the result is kept in the first layer
    ("1b", {"lora_targets": ("w2",)}, 2048, 1),
    ("1b", QLORA | {"lora_targets": ("wo",)} | ROWS | SHARDS, 2048, 4),  # the peak is in forward, where w2 is turned back
    ("125m", {"lora_targets": ("all-linear", "output"), "lora_rank": 64} | AGAIN | SHARDS, 2048, 4),  # the head's
    ("7b", ONE_BY_ONE | QLORA | AGAIN, 2048, 1),
    ("70b", ONE_BY_ONE | QLORA | {"lora_targets": ("wq", "wv")}, 1024, 1),
    ("1b", ONE_BY_ONE | {"lora_targets": ("wo",)} | ROWS, 1024, 2),
    ("1b", ONE_BY_ONE | FULL, 1024, 1),
    ("125m", ONE_BY_ONE | FULL | AGAIN | SHARDS, 2048, 4),
    ("7b", {"dtype": "fp32"} | FULL, 2048, 1),  # most when w1, w2 and w3 have gradients, and attention is whole
    ("1b", {"dtype": "fp32"} | FULL | AGAIN, 1024, 1),
]


def agree(closed: dict, counted: dict) -> None:
    for term, size in counted.items():
        assert closed[term][1] == pytest.approx(size, rel=0.01, abs=10**6), term


@pytest.mark.parametrize(("preset", "flags", "tokens", "count"), COMPARED)
def test_every_term_of_the_formula_is_what_is_counted_on_gpus_within_a_hundredth(preset, flags, tokens, count):
    """In models of 3 layers, in which a block and the loss weigh more than in deep ones."""
    flags, sizes = {"dtype": "bf16"} | flags, replace(PRESETS[preset], n_layers=3)
    gpu = GPUS["t4" if flags["dtype"] == "fp16" else "a100-80"]
    run = rehearsal(flags, sizes, tokens, gpu, count)
    closed, counted = formula(sizes, run.config, gpu, count), simulated(predict(run), sizes.n_layers)
    assert closed.keys() == counted.keys()
    agree(closed, counted)


@pytest.mark.parametrize(("flags", "count"), [(QLORA | AGAIN, 1), (FULL | AGAIN | SHARDS, 8)])
def test_every_term_of_the_formula_is_what_is_counted_at_full_depth_within_a_hundredth(flags, count):
    gpu, depth = GPUS["h100"], PRESETS["1b"].n_layers
    run = rehearsal({"dtype": "bf16"} | flags, PRESETS["1b"], 2048, gpu, count)
    agree(formula(PRESETS["1b"], run.config, gpu, count), simulated(predict(run), depth))


BF16 = {"dtype": "bf16"}
ON_A_CPU = [{}, AGAIN, FULL, FULL | AGAIN, FULL | WITHIN, QLORA, BF16 | AGAIN, BF16 | PURE | AGAIN, BF16 | PURE | WITHIN]
ON_A_CPU += [DROP, BF16 | DROP | AGAIN, BF16 | QLORA | AGAIN | {"lora_targets": ("wo",)}]


@pytest.mark.parametrize(("preset", "flags"), [*(("125m", flags) for flags in ON_A_CPU), ("1b", BF16 | FULL)])
def test_every_term_of_the_formula_is_what_is_counted_on_a_cpu_within_a_hundredth(preset, flags):
    sizes = replace(PRESETS[preset], n_layers=3)
    run = rehearsal({"dtype": "fp32"} | flags, sizes, 512)
    agree(formula(sizes, run.config), simulated(predict(run), sizes.n_layers))


# The program


def test_7b_in_json_has_every_term_and_takes_seconds_and_little_memory():
    program = (
        "import resource, sys, runpy; sys.argv[0] = 'memory.py'; runpy.run_path('memory.py', run_name='__main__');"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    arguments = "--model 7b --method qlora --gradient_checkpointing --model_max_length 2048 --gpu 3090 --json".split()
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=100
    )
    answer, used = done.stdout.splitlines()
    assert int(used) < 2 * 10**6  # kB
    answer = json.loads(answer)
    assert answer.keys() == {"model", "method", "flags", "terms", "per_layer", "peak", "peak_phase", "verdict"}
    assert all(term.keys() == {"formula", "simulated", "measured"} for term in answer["terms"].values())
    assert {"weights", "adapters", "gradients", "optimizer state", "logits and loss", "CUDA context"} <= answer["terms"].keys()
    assert [row["layer"] for row in answer["per_layer"]] == list(range(32))
    assert {"forward_kept", "backward_peak", "backward_added", "backward_freed"} < answer["per_layer"][0].keys()
    peak = answer["peak"]
    assert peak["allocated"]["simulated"] < peak["reserved"]["simulated"] < peak["nvidia_smi"]["simulated"] < 7e9
    assert peak["allocated"]["measured"] is None
    assert answer["verdict"]["fits"] and answer["peak_phase"].startswith("second step, ")


def test_i_have_a_3090_and_a_7b():
    answer = memory_py("--model", "7b", "--gpu", "3090").stdout
    assert "On 3090 (25.44 GB): lora to 8192 tokens, qlora to 8192 tokens" in answer
    assert "train.py --method lora" in answer and answer.count("tokens  ") >= 12


def test_70b_on_two_24_gb_cards():
    answer = memory_py("--model", "70b", "--gpu", "3090", "--nproc", "2").stdout
    assert "None fits whole" in answer and "one GPU that holds it: a100-40" in answer
    assert "2 x 3090 in shards, 1,024 tokens a row: " in answer and "simulated" in answer
    assert "torchrun --nproc_per_node 2 train.py --method qlora " in answer
    assert answer.endswith("--gradient_checkpointing True --model_max_length 1024 --fsdp True\n")


def test_where_the_formula_fits_and_the_allocator_does_not_what_would_is_named():
    answer = memory_py("--model", "70b", "--gpu", "24GB", "--nproc", "2", "--fsdp", "True").stdout
    assert "None leaves room for the allocator.\n  2 x 24GB in shards, 4,096 tokens a row" in answer
    assert "torchrun --nproc_per_node 2 train.py --method qlora " in answer and "--cpu_offload True" in answer


def test_where_to_begin_names_the_flags_that_its_figure_is_of():
    answer = memory_py("--model", "13b", "--gpu", "3090", "--nproc", "4", "--fsdp", "--lora_rank", "16").stdout
    begin = answer.splitlines()[-1].split(" --data RECORDS ")[1]
    assert begin == (
        "--gradient_checkpointing True --lora_rank 16 --model_max_length 4096 --per_device_train_batch_size 2 --fsdp True"
    )


def test_what_fits_by_arithmetic_but_not_with_the_allocators_segments_is_not_where_to_begin():
    words = ["--model", "1b", "--nproc", "4", "--fsdp"]
    tried = rehearsal({"dtype": "bf16"} | AGAIN | SHARDS, PRESETS["1b"], 4096).config
    tried = replace(tried, model_max_length=2048, per_device_train_batch_size=4)
    least = needed(PRESETS["1b"], tried, find_gpu("80GB"), 4)
    answer = memory_py(*words, "--gpu", f"{least / 1e9 + 0.05:.3f}GB").stdout
    assert "lora to 8192 tokens" in answer and "--per_device_train_batch_size 4" not in answer.splitlines()[-1]


def test_gpus_without_bf16_share_a_model_out_in_fp16():
    def make(method, **more):
        return TrainConfig(method=method, quantize="nf4", dtype="fp16", **more)

    assert within(PRESETS["1b"], make, find_gpu("t4"), 2).startswith("2 x t4 in shards, 4,096 tokens a row: ")


def test_a_folder_in_4_bits_is_answered_for_qlora_alone(tmp_path):
    names = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads", "vocab_size": "vocab_size"}
    known = {theirs: getattr(SIZES, ours) for theirs, ours in names.items()}
    known |= {"intermediate_size": 120, "num_key_value_heads": 2, "max_position_embeddings": 4096, "model_type": "llama"}
    packing = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "config.json").write_text(json.dumps(known | {"quantization_config": packing}))
    grid = json.loads(memory_py("--model", str(tmp_path), "--json").stdout)["grid"]
    assert {row["method"] for row in grid} == {"qlora"}
    assert memory_py("--model", str(tmp_path), "--method", "qlora").returncode == 0
    refused = memory_py("--model", str(tmp_path), "--method", "lora")
    assert refused.returncode == 2 and "is packed in 4 bits: --quantize nf4, or --method qlora, uses it so" in refused.stderr


def test_what_is_no_help_is_not_among_what_helps():
    """In full fine-tuning the gradients are the peak: with checkpointing alone it stays as high."""
    run = rehearsal(FULL | {"dtype": "bf16"}, PRESETS["7b"], 512)
    before = needed(PRESETS["7b"], run.config, GPUS["3090"])
    assert needed(PRESETS["7b"], replace(run.config, gradient_checkpointing=True), GPUS["3090"]) == before
    ways = advice(PRESETS["7b"], run.config, GPUS["3090"], 1)
    assert all(way["bytes"] < before for way in ways) and not any(way["change"].startswith("--gradient_ch") for way in ways[:3])


@pytest.mark.parametrize("flags", [FULL, PURE | SHARDS | {"hsdp": 2}, FULL | SHARDS | {"cpu_offload": True}])
def test_a_layers_backward_frees_what_its_forward_kept(flags):
    """Also where more than gradients stays: what is summed over copies, what is gathered for the next."""
    sizes, count = replace(PRESETS["125m"], n_layers=3), 4 if "fsdp" in flags else 1
    run = rehearsal({"dtype": "bf16"} | flags, sizes, 512, GPUS["h100"], count)
    for row in layer_rows(predict(run)):
        assert row["backward_freed"] == pytest.approx(row["forward_kept"], rel=0.02) and row["backward_added"] >= 0


def test_on_a_gpu_dropout_keeps_a_byte_a_number_and_on_a_cpu_as_many_as_the_number_has():
    def kept(gpu, **flags):
        run = rehearsal({"dtype": "bf16", "lora_targets": ("wq",)} | flags, replace(SIZES, n_layers=3), gpu=gpu)
        return simulated(predict(run), 3)["activations, last layer"]

    numbers = 64 * SIZES.dim
    for gpu, mask in ((GPUS["a100-80"], 1), (None, 2)):
        # Without dropout the adapter keeps the norm's result; with it its own input, as large, and what was zeroed.
        assert kept(gpu, lora_dropout=0.1) - kept(gpu) == numbers * mask


def test_what_does_not_fit_is_told_what_would():
    answer = memory_py("--model", "1b", "--method", "full", "--gpu", "8GB").stdout
    assert "It does not fit: 8GB has 8.00 GB" in answer
    changes = [line for line in answer.splitlines() if " GB  fits" in line or " GB  no" in line]
    assert len(changes) >= 4 and any("fits" in line for line in changes)


def test_what_is_advised_can_be_run_and_sharding_keeps_how_weights_and_moments_are_kept():
    """TrainConfig refuses what cannot be; so each proposal, one after the other, is made into one."""
    gpu, sizes = find_gpu("3GB"), PRESETS["7b"]
    for given in (FULL, FULL | {"fsdp": True}, PURE, PURE | {"fsdp": True}):
        flags = rehearsal({"dtype": "bf16"} | given, sizes, 2048).config
        offered = [new for _, new in cheaper(flags, 8)]
        assert ({"optim": "adamw_8bit", "pure_bf16": True} in offered) == ("pure_bf16" not in given)
        kept = sharded(flags)
        assert (kept.fsdp, kept.optim, kept.pure_bf16) == (True, flags.optim, flags.pure_bf16)
        together = [way["change"] for way in advice(sizes, flags, gpu, 8)]
        for words in (line for line in together if "--method qlora" in line and "sharded" not in line):
            TrainConfig(
                **{"dtype": "bf16"} | with_tuples(parse_flags(TrainConfig, "", words.split(",")[0].split())) | {"quantize": "nf4"}
            )
            assert "pure_bf16 True" not in words
        need = [needed(sizes, replace(sharded(flags), **new), gpu, 8) for new in ({}, {"optim": "adamw_8bit", "pure_bf16": True})]
        assert need[1] < need[0] or "pure_bf16" in given


@pytest.mark.parametrize(
    ("given", "changes"),
    [
        (TEXTBOOK, {"attention": "sdpa"}),
        ({"dtype": "fp32"}, {"dtype": "bf16"}),
        (FULL | SHARDS | {"hsdp": 2}, {"hsdp": 0}),
        ({"per_device_train_batch_size": 9}, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}),
        ({"quantize": "int8"}, QLORA),
        (PURE | WITHIN, FULL | {"method": "lora", "pure_bf16": False, "optim": "adamw", "optimizer_in_backward": False}),
    ],
)
def test_a_change_is_named_by_flags_that_go_with_those_given(given, changes):
    """As the user types it: behind what was given."""
    flags = rehearsal({"dtype": "bf16"} | given, PRESETS["7b"], 2048).config
    change, new = next((change, new) for change, new in cheaper(flags, 4) if changes.items() <= new.items())
    words = [
        f"--{name} {value}" for name, value in ({"dtype": "bf16", "model_max_length": 2048, "device": "cpu"} | given).items()
    ]
    typed = " ".join([*words, change.split(",")[0]]).split()
    assert TrainConfig(**with_tuples(parse_flags(TrainConfig, "", typed))) == replace(flags, **new)


def test_a_change_that_the_allocators_segments_leave_no_room_for_is_not_said_to_fit():
    """7b in shards over two GPUs in pure bf16 needs 23 GB by arithmetic and 28 with the segments it is cut from."""
    answer = json.loads(memory_py(*"--model 7b --method full --nproc 2 --fsdp --gpu 3090 --json".split()).stdout)
    pure = next(way for way in answer["verdict"]["changes"] if "--pure_bf16" in way["change"])
    own = "--model 7b --method full --nproc 2 --fsdp --gpu 3090 --json --optim adamw_8bit --pure_bf16"
    verdict = json.loads(memory_py(*own.split()).stdout)["verdict"]
    assert (pure["bytes"], pure["fits"]) == (verdict["needed"], verdict["fits"]) and not pure["fits"]


def test_where_the_head_alone_is_trained_blocks_keep_nothing_and_have_no_backward():
    answer = json.loads(memory_py(*"--model 125m --method lora --lora_targets output --gpu t4 --json".split()).stdout)
    assert answer["terms"]["a block's backward"]["simulated"] == 0 and answer["verdict"]["fits"]
    assert all((row["forward_kept"], row["backward_peak"]) == (0, None) for row in answer["per_layer"])


def test_where_one_change_is_not_enough_the_fewest_that_are_together_are_named():
    flags = rehearsal({"dtype": "bf16", "per_device_train_batch_size": 8}, PRESETS["13b"], 2048).config
    *alone, together = advice(PRESETS["13b"], flags, GPUS["3090"], 1)
    assert len(alone) == 3 and not any(way["fits"] for way in alone)
    assert together["change"] == "--method qlora --quantize nf4 --gradient_checkpointing True" and together["fits"]
    changed = replace(flags, method="qlora", quantize="nf4", gradient_checkpointing=True)
    assert together["bytes"] == needed(PRESETS["13b"], changed, GPUS["3090"]) <= GPUS["3090"].memory


def test_where_no_change_is_enough_that_is_said():
    assert "None of this is enough:" in memory_py("--model", "125m", "--method", "full", "--gpu", "0.6GB").stdout


def fits(flags: dict, sizes: ModelConfig, tokens: int, gpu, count: int = 1) -> bool:
    run = rehearsal({"dtype": "bf16"} | flags, sizes, tokens, gpu, count)
    return predict(run).reserved + gpu.context <= gpu.memory


@pytest.mark.parametrize(("tokens", "size"), [(1024, "4GB"), (256, "2GB")])
def test_the_largest_batch_fits_and_one_more_does_not(tokens, size):
    words = f"--model 125m --method lora --gpu {size} --solve batch --model_max_length {tokens}"
    batch = int(memory_py(*words.split()).stdout.split()[1])
    found = [fits({"per_device_train_batch_size": n}, PRESETS["125m"], tokens, find_gpu(size)) for n in (batch, batch + 1)]
    assert found == [True, False]


def test_the_largest_length_fits_and_the_next_does_not():
    answer = memory_py(*"--model 125m --method lora --gpu 2GB --solve length".split()).stdout
    length = int(answer.split()[1])
    assert "is the largest on 2GB in steps of 128" in answer and length < 4096
    assert [fits({}, PRESETS["125m"], n, find_gpu("2GB")) for n in (length, length + 128)] == [True, False]


def test_a_length_that_ends_with_the_models_window_says_so():
    answer = memory_py(*"--model 125m --method lora --gpu t4 --solve length".split()).stdout
    assert answer.startswith("--model_max_length 4096 fits on t4, and is all that the model was trained to read: ")


def test_the_fewest_gpus_hold_it_and_one_less_does_not():
    answer = memory_py(*"--model 1b --method full --gpu 7.2GB --fsdp --solve gpus".split()).stdout
    count = int(answer.split()[0])
    assert f"--nproc {count} --fsdp" in answer and count == 5
    assert [fits(FULL | SHARDS, PRESETS["1b"], 512, find_gpu("7.2GB"), n) for n in (count, count - 1)] == [True, False]
    assert memory_py(*"--model 1b --method full --gpu h100 --nproc 2 --fsdp --solve gpus".split()).stdout.startswith("1 x h100: ")


def test_the_peak_is_a_row_of_the_timeline_wherever_it_is():
    answer = memory_py(*"--model 1b --method full --fsdp --nproc 8 --gpu h100".split()).stdout
    phase = answer.split("The peak is in the ")[1].split(".")[0]
    assert any(line.startswith(phase) and "<- the peak" in line for line in answer.splitlines())


def test_what_waits_in_the_hosts_memory_is_not_said_to_be_most_of_a_gpus_peak():
    flags = rehearsal({"dtype": "bf16"} | FULL | SHARDS | {"cpu_offload": True}, PRESETS["7b"], 2048).config
    assert "host" not in memory.explain_out_of_memory(PRESETS["7b"], flags, GPUS["3090"], 2).split("\n")[0]


def test_the_starting_documents_table():
    """The formula's and the count's own figures are in test_every_term; here, that the page is whole and its sums are."""
    answer = memory_py("--reproduce").stdout
    for figure in ("13.500", "0.844", "0.760", "69.904", "0.717", "0.405", "26.954", "96.86"):
        assert figure in answer, figure
    ladder = [line.split()[-1] for line in answer.splitlines()[-9:]]
    readme = (REPOSITORY / "README.md").read_text()
    for i, figure in enumerate(ladder):
        assert float(figure) > 0 and (i == 5 or f"| {figure} |" in readme), "README's table is not what the command prints"
    assert sorted(map(float, ladder[3:]), reverse=True) == [float(figure) for figure in ladder[3:]]


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    memory_py("--model", "125m", "--method", "lora", "--gpu", "t4", "--plot", str(tmp_path / "out.png"))
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ("--model 7b --gpu 5090x", "known are t4, 3090, 4090, a100-40, a100-80, h100, h200"),
        ("--model nowhere", "unknown model 'nowhere': known are 125m"),
        ("--model 7b --mehtod lora", "did you mean --method?"),
        ("--model 7b --method full --quantize nf4", "freezes the weights and --method full trains them"),
        ("--model 7b --method lora --model_max_length 8192", "--per_device_train_batch_size 2 --model_max_length 4096"),
        ("--model 7b --method lora --gpu t4 --dtype bf16", "t4 has no bf16"),
        ("--model 7b --solve batch", "--solve needs --gpu"),
        ("--model 7b --gpu t4 --lora_targets wqq", "unknown LoRA target wqq: known are all-linear, output"),
        ("--model 7b --gpu 4090 --nproc 4 --fsdp True --hsdp 3", "--hsdp 3: 4 processes are not whole groups of 3"),
        ("--model 7b --method full --optimizer_in_backward", "it needs --max_grad_norm 0"),
        (
            "--model 7b --method lora --nproc 2 --optimizer_in_backward --max_grad_norm 0",
            "DDP sums gradients that it then no longer",
        ),
        ("--model 7b --gpu 0GB", "unknown GPU '0GB'"),
        ("--model 7b --gpu=", "unknown GPU ''"),
        ("--model 125m --method lora --per_device_train_batch_size 1000000000000", "more than any machine holds"),
        ("--model 125m --method lora --plot out.jsonl", "name a .png, .pdf or .svg in a folder that is there"),
        ("--reproduce --json", "--reproduce is of a 7B at 2,048 tokens"),
        ("--model 7b --gpu 3090 --plot out.png", "--plot draws one run: --method says which"),
        ("--model 7b --gpu 3090 --solve batch --json", "--solve answers in a line"),
        ("--model 7b --gpu 3090 --nproc 4 --fsdp --hsdp 2 --solve gpus", "leave out --hsdp"),
        ("--model 7b --nproc 0", "--nproc must be from 1 to 2048, not 0"),
        ("--model 7b --method lora --fsdp", "--fsdp shares the model out over several GPUs: --nproc"),
        ("--model 7b --device cpu --gpu t4", "--device cpu takes neither"),
    ],
)
def test_a_users_mistake_gets_one_sentence_and_code_2(arguments, answer):
    done = memory_py(*arguments.split())
    assert done.returncode == 2 and answer in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout


def test_as_a_module_it_knows_nothing_of_the_project():
    code = "import sys, memory; assert not {'train', 'model', 'quant', 'lora', 'data', 'generate'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
