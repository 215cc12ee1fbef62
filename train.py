"""Training: one loop for full fine-tuning, LoRA and QLoRA, on a CPU, a GPU, or several with torchrun.

    torchrun train.py --method lora                                   the embedded default, a minute on two CPU cores
    torchrun train.py --model llama-2-7b --data mine.jsonl            your data, real weights
    torchrun --nproc_per_node 8 train.py --fsdp True ...              a model in shards over eight GPUs

A step of fine-tuning:

    for each micro-batch:   loss = sum over supervised tokens of -log p(token) / supervised tokens in the whole step
                            backward: add d loss / d weight into .grad
    clip the gradient to length 1 at most; AdamW moves each trained weight by about the learning rate; forget the gradient

The division by the step's own count, over every micro-batch and every rank (one of torchrun's processes), is what makes
accumulation and more GPUs change nothing: a mean of means would weigh a token in a short reply more than one in a long reply.

Nothing here depends on what ran before but the weights and the optimizer: the data of a step is a function of (seed, step), so is
its dropout, so is the learning rate. That is all of exact resuming. A checkpoint is written beside its place and renamed when it
is whole: whenever the machine dies, the newest folder that has its name can be read, by any number of processes.

In running/ stand what a run checks and reads before it trains, how its processes talk, what it asks, saves and logs;
sizing/rehearsal.py predicts and measures its memory.
"""

import contextlib
import gc
import math
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from data import IGNORE, PAD_ID, DataError, PackedBatches
from generate import TINY, pick_device, pick_dtype
from helping.flags import parse_flags
from helping.malloc import keep_freed_memory
from lora import LoRAError, add_lora
from model import CheckpointError, Llama, ModelConfig, load_model, random_model, read_config
from quant import QUANTIZERS, AdamW8bit, NF4Linear
from running.checkpoint import Saver
from running.exam import Exam
from running.folder import Log, alone_in, begin_folder, check_start, describe, finish_folder, finished, save_final
from running.plan import beginning, make_plan
from running.reading import Data, read_data
from running.settings import RunError, check, completed
from running.workers import NotFinite, Stopped, StopSignal, Workers, asking, packed_together, restarts, whole


@dataclass(frozen=True)
class TrainConfig:
    # What is trained
    model: str = str(TINY)  # folder with weights: Meta's consolidated.*.pth or Hugging Face's *.safetensors
    method: Literal["lora", "qlora", "full"] = "lora"  # lora: adapters beside frozen weights; qlora: frozen in NF4; full: all
    quantize: Literal["none", "int8", "nf4"] = "none"  # keep the frozen weights of lora in 8 or 4 bits; qlora means nf4
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the computation; auto: bf16 on a GPU that has it, fp32 on a CPU
    attention: Literal["sdpa", "textbook"] = "sdpa"  # sdpa: never all scores at once; textbook: three lines one can read
    gradient_checkpointing: bool = False  # compute each block again in backward instead of keeping its activations
    compile: bool = False  # fuse each block's small operations into kernels made for it: a slow first step, then faster ones
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA if there, else CPU
    # LoRA
    lora_rank: int = 8  # r: the rank of each correction; LoRA's section 7.2 finds that small ones are enough
    lora_alpha: float = 16.0  # the correction is scaled by alpha / r; twice the rank is usual
    lora_dropout: float = 0.0  # share of the adapter's inputs zeroed in training; 0.1 is usual where there are few records
    lora_targets: tuple[str, ...] = ("all-linear",)  # names such as wq wv output, or all-linear: every linear of the blocks
    use_rslora: bool = False  # scale by alpha / sqrt(r) instead, for large ranks
    # Data
    data: tuple[str, ...] = (str(TINY / "instructions.jsonl"),)  # files of records; mine.jsonl:2 is seen twice as often
    source: str | None = None  # the field or column with the prompt, if it has a name of its own
    target: str | None = None  # the field or column with the reply
    system: str | None = None  # the field or column with a system message
    template: str | None = None  # how a dialog is written out: a name or a JSON file; by the records' fields if not given
    tokenizer: str | None = None  # SentencePiece file; tokenizer.model in the model's folder if not given
    model_max_length: int = 512  # longest document in tokens; activations grow with it, and memory.py says how much
    too_long: Literal["cut", "drop"] = "cut"  # what to do with a longer one
    train_on_inputs: bool = False  # learn the prompts as well as the replies
    eval_data: tuple[str, ...] = ()  # files of held-out records; the first one's loss decides which step was best
    eval_split: float = 0.0  # or: this share of the data is held out
    exact_match: bool = False  # count how many held-out records are answered word for word, before and after
    samples: int = 5  # held-out prompts answered before and after, in samples.md
    # Optimization
    num_train_epochs: float = 3.0  # times each document is seen; beyond a few a model learns them by heart
    max_steps: int = 0  # stop after this many steps instead, if above 0
    per_device_train_batch_size: int = 1  # a row, the unit of work, has this many x model_max_length tokens
    gradient_accumulation_steps: int = 1  # rows summed into one step: a larger batch in the memory of one row
    learning_rate: float | None = None  # peak; if not given, 2e-4 (lora) or 2e-5 (full) x 4096 / dim
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"  # how it falls after the warm-up
    warmup_ratio: float = 0.03  # share of the steps in which it rises from 0, while AdamW's moments know little; as in Alpaca
    optim: Literal["adamw", "adamw_8bit"] = "adamw"  # adamw_8bit: moments of 2 bytes a weight instead of 8
    pure_bf16: bool = False  # full: keep no fp32 weights; needs adamw_8bit, which rounds by chance and so loses no small update
    weight_decay: float = 0.0  # AdamW's pull of every trained matrix towards zero; in a few epochs it changes little
    adam_beta1: float = 0.9  # memory of AdamW's mean gradient: 1 / (1 - 0.9) = 10 steps
    adam_beta2: float = 0.999  # memory of its mean square: 1,000 steps; Llama's pre-training took 0.95, 20 steps
    adam_epsilon: float = 1e-8  # keeps its division finite
    max_grad_norm: float = 1.0  # a longer gradient is shortened to this, so that no odd batch throws the weights far; 0: never
    optimizer_in_backward: bool = False  # step each weight as its gradient is ready and forget that; needs --max_grad_norm 0
    seed: int = 42  # draws the adapters, the order of the data, the dropout
    # Several GPUs (torchrun --nproc_per_node N)
    fsdp: bool = False  # cut weights, gradients and optimizer over the processes, instead of a whole copy in each
    cpu_offload: bool = False  # with fsdp: they wait in the host's memory, and the optimizer works there
    hsdp: int = 0  # with fsdp: a whole copy for every so many processes, such as a node's 8, and shards only among these
    # Saving and reporting
    output_dir: str | None = None  # folder of the run; runs/METHOD if not given
    save_steps: int = 100  # a checkpoint to resume from every so many steps, the most that can be lost; 0: none
    save_total_limit: int = 2  # checkpoints kept; 0: all
    async_save: bool = False  # go on training while a checkpoint is written, from a copy of it in the host's memory
    logging_steps: int = 10  # a row in log.jsonl every so many steps
    eval_steps: int = 0  # held-out loss every so many steps; 0: before and after only
    load_best_model_at_end: bool = False  # finish with the weights of the lowest held-out loss
    resume: bool = False  # go on from the newest checkpoint in output_dir, with the settings of that run
    overwrite: bool = False  # replace the run in output_dir

    def __post_init__(self):
        check(self)


def complete(given: dict) -> TrainConfig:
    """The settings of a run from the flags given; what they leave open is a default or, with --resume, the run's own."""
    return TrainConfig(**completed(given, TrainConfig, restarts() > 0))


# ---------------------------------------------------------------------------------------------------------------------
# The pieces


def build(config: TrainConfig, device: torch.device, sizes: ModelConfig | None = None, shard=None) -> Llama:
    """The model ready to train: loaded in the format of the method, adapted, its trainable weights in fp32.

    lora: frozen weights in the dtype of the computation, or quantised, and adapters in fp32. full: every weight in fp32
    ("masters"), cast where it is used, because bf16's 8 bits would lose most of AdamW's small updates.
    sizes: random weights of these sizes instead of those in the folder config.model, to rehearse a run without them.
    shard(module): what cuts a block, and at last the model, into shards; each is whole on the device for that moment only."""
    full = config.method == "full"
    dtype = torch.float32 if full and not config.pure_bf16 else computed_in(config, device)
    linear = QUANTIZERS[config.quantize]
    if linear is NF4Linear and not sizes and dist.is_initialized():
        linear = packed_together(linear)
    options = {"device": device, "dtype": dtype, "attention": config.attention, "quantize": linear}
    adapter = (config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets, config.use_rslora)
    torch.manual_seed(config.seed)  # every rank draws the same A

    def finish(model: Llama, part: str) -> None:
        if not full:
            add_lora(model, *adapter, part=part)
        if config.compile and part:  # block by block: they are alike, so one compilation serves all
            model.get_submodule(part).compile()
        if shard:
            shard(model.get_submodule(part))

    if sizes:
        model = random_model(sizes, **options, each_part=finish)
    else:
        model = load_model(config.model, **options, each_part=finish)
    model.gradient_checkpointing, model.computed_on = config.gradient_checkpointing, device
    return model


def sharding(config: TrainConfig, device: torch.device, workers: Workers):
    """FSDP ("PyTorch FSDP", section 3; ZeRO, section 5.3): each process keeps 1/N of every block, of its gradients and of its
    optimizer state. A block is gathered for its forward, given back, gathered again for its backward; each then keeps its share
    of the mean gradient (training_step makes a sum of it). Packed NF4 is cut as the bytes it is. Returns what shards a module, or
    None."""
    if not config.fsdp:
        return None
    dtype = computed_in(config, device)
    mesh = {"copies": workers.world // config.hsdp, "shards": config.hsdp} if config.hsdp else {"shards": workers.world}
    options = {"mesh": init_device_mesh(device.type, tuple(mesh.values()), mesh_dim_names=tuple(mesh))}
    if config.method == "full" and dtype != torch.float32:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if config.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    return partial(fully_shard, **options)


def in_parallel(config: TrainConfig, model: Llama, workers: Workers):
    """The model as it is called in training: with a whole copy in each process, inside DistributedDataParallel (DDP), which has
    the gradients in its own buckets only."""
    return model if workers.world == 1 or config.fsdp else DistributedDataParallel(model, gradient_as_bucket_view=True)


def computed_in(config: TrainConfig, device: torch.device) -> torch.dtype:
    return torch.bfloat16 if config.pure_bf16 else pick_dtype(config.dtype, device)


def make_optimizer(config: TrainConfig, model: Llama) -> torch.optim.Optimizer:
    """AdamW ("Decoupled Weight Decay Regularization", algorithm 2) over what is trained; only matrices decay, never norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options = {"lr": 0.0, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}  # lr: set at every step
    if config.optim == "adamw_8bit":
        return AdamW8bit(groups, **options)
    fused = trained[0].device.type in ("cpu", "cuda")  # one pass over memory instead of a dozen
    return torch.optim.AdamW(groups, fused=fused, **options)


def precision(config: TrainConfig, device: torch.device):
    """(scaler, autocast): what keeps fp16's small gradients from becoming 0, and what casts fp32 masters where they are used."""
    dtype = computed_in(config, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    masters = config.method == "full" and dtype != torch.float32 and not config.pure_bf16 and not config.fsdp  # FSDP casts itself
    # Copies of the weights are not kept to the end of forward: with checkpointing those of 7B would be 13 GB.
    return scaler, partial(torch.autocast, device.type, dtype, enabled=masters, cache_enabled=False)


def peak_learning_rate(config: TrainConfig, dim: int) -> float:
    """The peak given, or the usual one for 7B carried over to this width: the best rate of Adam falls as 1 / width
    ("Tensor Programs V", table 3)."""
    if config.learning_rate is not None:
        return config.learning_rate
    return (2e-5 if config.method == "full" else 2e-4) * 4096 / dim


def learning_rate(config: TrainConfig, step: int, total: int, peak: float) -> float:
    """The rate of step 0, 1, ..., total - 1: a straight rise over the warm-up, then the schedule, which would reach 0 in
    step `total` (a constant one stays)."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.lr_scheduler_type == "constant":
        return peak
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (1 - progress if config.lr_scheduler_type == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


def row_seed(seed: int, step: int, row: int) -> int:
    """What a row of a step draws its dropout from, whatever ran before it and whichever process has it."""
    return int(np.random.SeedSequence((seed, step, row)).generate_state(1, np.uint64)[0])


# ---------------------------------------------------------------------------------------------------------------------
# A step, and what is measured between steps


class Step(NamedTuple):
    loss: float  # in nats per supervised token
    grad_norm: float | None  # before clipping
    supervised_tokens: int


def training_step(config, model, optimizer, scaler, micro_batches, step: int, rate: float, workers: Workers, autocast) -> Step:
    """The run's optimizer step number `step`, over this rank's micro-batches. Returns what it was for all ranks together.

    Raises NotFinite when the loss or the gradient is not a finite number, before a weight is touched (with optimizer_in_backward,
    which never has the whole gradient: the loss)."""
    supervised = workers.sum(sum(int((batch["labels"] != IGNORE).sum()) for batch in micro_batches))
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss_sum = 0.0
    for i, batch in enumerate(micro_batches):
        torch.manual_seed(row_seed(config.seed, step, workers.rank + i * workers.world))
        # DDP averages the gradients of all ranks in backward. Only the last micro-batch needs that; x world turns it into a sum.
        # FSDP does it each time: the gradient of a whole model has no room to wait.
        hold = isinstance(model, DistributedDataParallel) and i < len(micro_batches) - 1
        with model.no_sync() if hold else contextlib.nullcontext():
            with autocast():
                loss = model(**{name: x.to(workers.device, non_blocking=True) for name, x in batch.items()})
            if config.optimizer_in_backward:
                workers.sum_finite(float(loss.detach()))  # now: after backward the weights have moved
            scaler.scale(loss * (workers.world / supervised)).backward()
        loss_sum += loss.detach()
    loss = workers.sum_finite(float(loss_sum)) / supervised
    if config.optimizer_in_backward:
        return Step(loss, None, int(supervised))

    scaler.unscale_(optimizer)
    trained = [p for p in model.parameters() if p.requires_grad]
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm or math.inf)).item()
    if not math.isfinite(grad_norm) and not scaler.is_enabled():  # in fp16 the scaler skips such a step and lowers its scale
        raise NotFinite(f"the gradient is {grad_norm}")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return Step(loss, grad_norm, int(supervised))


def step_in_backward(model: Llama, optimizer) -> None:
    """Have every weight stepped as soon as its gradient is complete, and the gradient forgotten: only one of them exists at a
    time, and the optimizer skips the weights that have none."""

    def step(weight):
        optimizer.step()
        weight.grad = None

    for weight in model.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(step)


@torch.no_grad()
def evaluate(model: Llama, batches: PackedBatches, workers: Workers, autocast) -> float:
    """Mean cross-entropy per supervised token of all rows, in nats. Each rank reads its share."""
    loss, supervised = 0.0, 0
    with asking(model):
        for first in range(0, len(batches), workers.world):  # past the last row a batch is empty: all ranks take as many turns
            batch = batches.batch(0, first + workers.rank)
            supervised += int((batch["labels"] != IGNORE).sum())
            with autocast():
                loss += model(**{name: x.to(workers.device) for name, x in batch.items()}).item()
    return workers.sum(loss) / workers.sum(supervised)


# ---------------------------------------------------------------------------------------------------------------------
# The run


def train(config: TrainConfig) -> list[dict]:
    """Read, build, loop, save. Returns the rows of log.jsonl.

    Raises DataError, CheckpointError, LoRAError or RunError, with one sentence about what the user can mend."""
    from sizing.rehearsal import Memory  # here, as it imports this file

    device = pick_device(config.device)
    workers = Workers(device)
    if config.resume and (rows := finished(config)):
        workers.say(f"{config.output_dir} holds the finished run, nothing is left to do: --overwrite would begin it anew")
        return rows
    sizes = read_config(config.model)
    check_start(config, sizes, workers.world)
    if device.type == "cpu":
        keep_freed_memory()
        if sizes.dim < 512 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # in a model this small, threads bring little, and on a busy machine wait for each other
    with alone_in(Path(config.output_dir), workers):
        data = read_data(config, workers.say)
        memory = Memory(config, sizes, data, workers)
        if workers.first:
            print(memory.predict())
        try:
            return run(config, data, memory, workers)
        except torch.OutOfMemoryError:
            raise RunError(memory.explained(ran_out=True)) from None


def run(config: TrainConfig, data: Data, memory, workers: Workers) -> list[dict]:
    """Build, loop, save: what may run out of a GPU's memory."""
    folder, device = Path(config.output_dir), workers.device
    model = build(config, device, shard=sharding(config, device, workers))
    optimizer = make_optimizer(config, model)
    scaler, autocast = precision(config, device)
    parallel = in_parallel(config, model, workers)
    if config.optimizer_in_backward:
        step_in_backward(model, optimizer)

    # Begin, or go on where a checkpoint stands: beside weights and optimizer, `state` is all that the steps before have left.
    saver = Saver(config, model, optimizer, scaler, workers)
    fresh = beginning(config, data, workers.world)
    state = saver.found() or fresh
    peak = peak_learning_rate(config, model.config.dim)
    plan = make_plan(config, data.batches, state, fresh, peak, computed_in(config, device), workers)
    workers.say(describe(config, model, data, plan, workers))
    exam = Exam(config, data, model, workers)
    before = exam.ask()
    saver.restore()
    workers.wait()  # nothing is written before every rank has found all in order
    if workers.first:
        begin_folder(config, state["rows"], data, plan, workers)
    log = Log(config, state["rows"], plan.total, workers)

    def judge():
        losses = {f"eval_{name}_loss": evaluate(model, rows, workers, autocast) for name, rows in data.evaluations.items()}
        if losses:
            log.judged(step=state["step"], epoch=state["step"] / plan.steps_per_epoch, **losses)
            first = next(iter(losses.values()))
            if first < state["best"]:
                state["best"] = first
                if config.load_best_model_at_end:
                    saver.save_best(state)

    # The loop.
    start = state["step"]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model.train()
    with StopSignal() as stop, saver:
        if state is fresh:
            judge()
            if config.save_steps:
                saver.rehearse(state)
        for step in range(start + 1, plan.total + 1):
            began = time.perf_counter()
            epoch, rows = plan.rows(step, workers.rank, workers.world)
            micro_batches = [data.batches.batch(epoch, row) for row in rows]
            rate = learning_rate(config, step - 1, plan.total, plan.peak)
            with memory.watched(step - start, model, optimizer, micro_batches):
                try:
                    row = training_step(config, parallel, optimizer, scaler, micro_batches, step, rate, workers, autocast)
                except NotFinite as error:
                    raise plan.explain(error, step, data.batches, workers.world) from None
            state["step"], seconds = step, time.perf_counter() - began
            tokens = int(workers.sum(sum(int((batch["tokens"] != PAD_ID).sum()) for batch in micro_batches)))
            log.step(step, tokens, seconds, epoch=step / plan.steps_per_epoch, learning_rate=rate, **row._asdict())
            if step == plan.total or (config.eval_steps and step % config.eval_steps == 0):
                judge()
            stopping = workers.sum(float(stop.asked or saver.failed)) > 0 and step < plan.total
            if stopping or (config.save_steps and step % config.save_steps == 0):
                saver.save(state)  # which first says what befell the one before it
            if stopping:
                saver.wait()
                raise Stopped(f"stopped after step {step} of {plan.total}, it is saved: --resume --output_dir {folder} goes on")

    # Save, then ask again.
    if text := memory.measured():
        workers.say(text)
    if config.load_best_model_at_end:
        saver.load_best(state)
    save_final(config, model, data, plan.dtype, workers)
    workers.say(f"saved in {folder}, read back and compared")
    for row in exam.report(folder, before, exam.ask()):
        log.record(step=plan.total, **row)
    if workers.first:
        log.plot()
        finish_folder(folder)
    workers.wait()  # a process that leaves early takes its connections from under the others
    return log.rows


def main():
    rank = int(os.environ.get("RANK", 0))
    try:
        train(complete(parse_flags(TrainConfig, __doc__)))
    except (CheckpointError, DataError, LoRAError, RunError, OSError) as error:
        if rank:
            time.sleep(5)  # what befell all ranks, the first has said by now, and torchrun has ended this one
        sys.unraisablehook = lambda _: None  # a file that PyTorch had half written complains again when it is collected
        print(f"train.py: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        if rank == 0:
            print(f"\ntrain.py: {stopped}", file=sys.stderr)
    except KeyboardInterrupt:
        if rank == 0:
            print("\ntrain.py: stopped", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            gc.collect()  # DDP holds on to the group: what still had it at Python's own end could abort the process
            dist.destroy_process_group()


if __name__ == "__main__":
    import train  # the module that sizing/ imports, not a second copy of it

    train.main()
