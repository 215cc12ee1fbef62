"""Training: one loop for full fine-tuning, LoRA and QLoRA, on a CPU, a GPU, or several with torchrun.

    torchrun train.py --method lora                                   the embedded default, a minute on two CPU cores
    torchrun train.py --model llama-2-7b --data mine.jsonl            your data, real weights
    torchrun --nproc_per_node 8 train.py --fsdp True ...              a model in shards over eight GPUs

A step of fine-tuning:

    for each micro-batch:   loss = sum over supervised tokens of -log p(token) / supervised tokens in the whole step
                            backward: add d loss / d weight into .grad
    clip the gradient to length 1; AdamW moves each trained weight by about the learning rate; forget the gradient

The division by the step's own count, over every micro-batch and rank, is what makes accumulation and more GPUs change nothing:
a mean of means would weigh a token in a short reply more than one in a long reply.

Nothing here depends on what ran before but the weights and the optimizer: the data of a step is a function of (seed, step), so is
its dropout, so is the learning rate. That is all of exact resuming. A checkpoint is written beside its place and renamed when it
is whole: whenever the machine dies, the newest folder that has its name can be read, by any number of processes.
"""

import contextlib
import dataclasses
import gc
import json
import math
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from data import (
    IGNORE,
    PAD_ID,
    DataError,
    PackedBatches,
    Template,
    Tokenizer,
    choose_template,
    copies,
    encode_dialog,
    encode_documents,
    load_template,
    parse_flags,
    parse_input,
    read_records,
    with_tuples,
)
from generate import DTYPES, TINY, Sampling, answer, pick_device, pick_dtype
from lora import LoRAError, add_lora, lora_parameters, read_adapter, save_adapter
from memory import GPU, Tracker, explain_out_of_memory, predict
from model import (
    CheckpointError,
    Llama,
    ModelConfig,
    from_hf,
    load_model,
    open_checkpoint,
    random_model,
    read_config,
    save_hf,
    to_hf,
)
from preparing.cache import cache_folder, once
from preparing.readers import reader_of
from quant import QUANTIZERS, AdamW8bit, NF4Linear
from resuming.checkpoint import (
    RunError,
    checkpoints,
    make_state,
    read_state,
    restore,
    trained_weights,
    write_checkpoint,
    write_text,
    written_whole,
)


@dataclass(frozen=True)
class TrainConfig:
    # What is trained
    model: str = str(TINY)  # folder with weights: Meta's consolidated.*.pth or Hugging Face's *.safetensors
    method: Literal["lora", "qlora", "full"] = "lora"  # lora: adapters beside frozen weights; qlora: these in NF4; full: all
    quantize: Literal["none", "int8", "nf4"] = "none"  # keep the frozen weights of lora in 8 or 4 bits; qlora means nf4
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the computation; auto: bf16 on a GPU that has it, fp32 on a CPU
    attention: Literal["sdpa", "textbook"] = "sdpa"  # sdpa: PyTorch's fused kernel; textbook: the readable four lines
    gradient_checkpointing: bool = False  # compute each block again in backward instead of keeping its activations
    compile: bool = False  # fuse each block's small operations into kernels made for it: a slow first step, then faster ones
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA if there, else CPU
    # LoRA
    lora_rank: int = 8  # r: the rank of each correction
    lora_alpha: float = 16.0  # the correction is scaled by alpha / r
    lora_dropout: float = 0.0  # share of the adapter's inputs zeroed in training
    lora_targets: tuple[str, ...] = ("all-linear",)  # names such as wq wv output, or all-linear: every linear of the blocks
    use_rslora: bool = False  # scale by alpha / sqrt(r) instead, for large ranks
    # Data
    data: tuple[str, ...] = (str(TINY / "instructions.jsonl"),)  # files of records; mine.jsonl:2 is seen twice as often
    source: str | None = None  # the field or column with the prompt, if it has a name of its own
    target: str | None = None  # the field or column with the reply
    system: str | None = None  # the field or column with a system message
    template: str | None = None  # how a dialog is written out: a name or a JSON file; by the records' fields if not given
    tokenizer: str | None = None  # SentencePiece file; tokenizer.model in the model's folder if not given
    model_max_length: int = 512  # longest document in tokens
    too_long: Literal["cut", "drop"] = "cut"  # what to do with a longer one
    train_on_inputs: bool = False  # learn the prompts as well as the replies
    eval_data: tuple[str, ...] = ()  # files of held-out records; the first one's loss decides which step was best
    eval_split: float = 0.0  # or: this share of the data is held out
    exact_match: bool = False  # count how many held-out records are answered word for word, before and after
    samples: int = 5  # held-out prompts answered before and after, in samples.md
    # Optimization
    num_train_epochs: float = 3.0  # times each document is seen
    max_steps: int = 0  # stop after this many steps instead, if above 0
    per_device_train_batch_size: int = 1  # a row, the unit of work, has this many x model_max_length tokens
    gradient_accumulation_steps: int = 1  # rows summed into one step
    learning_rate: float | None = None  # peak; if not given, 2e-4 (lora) or 2e-5 (full) x 4096 / dim
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"  # how it falls after the warm-up
    warmup_ratio: float = 0.03  # share of the steps in which it rises from 0
    optim: Literal["adamw", "adamw_8bit"] = "adamw"  # adamw_8bit: moments of 2 bytes a weight instead of 8
    pure_bf16: bool = False  # full: keep no fp32 weights; needs adamw_8bit, which rounds by chance and so loses no small update
    weight_decay: float = 0.0  # AdamW's pull of every trained matrix towards zero
    adam_beta1: float = 0.9  # memory of AdamW's mean gradient
    adam_beta2: float = 0.999  # memory of its mean square
    adam_epsilon: float = 1e-8  # keeps its division finite
    max_grad_norm: float = 1.0  # longest gradient; 0: never clipped
    optimizer_in_backward: bool = False  # step each weight as its gradient is ready and forget that; needs --max_grad_norm 0
    seed: int = 42  # draws the adapters, the order of the data, the dropout
    # Several GPUs (torchrun --nproc_per_node N)
    fsdp: bool = False  # cut weights, gradients and optimizer over the processes, instead of a whole copy in each
    cpu_offload: bool = False  # with fsdp: they wait in the host's memory, and the optimizer works there
    hsdp: int = 0  # with fsdp: a whole copy for every so many processes, such as a node's 8, and shards only among these
    # Saving and reporting
    output_dir: str | None = None  # folder of the run; runs/METHOD if not given
    save_steps: int = 100  # a checkpoint to resume from every so many steps; 0: none
    save_total_limit: int = 2  # checkpoints kept; 0: all
    logging_steps: int = 10  # a row in log.jsonl every so many steps
    eval_steps: int = 0  # held-out loss every so many steps; 0: before and after only
    load_best_model_at_end: bool = False  # finish with the weights of the lowest held-out loss
    resume: bool = False  # go on from the newest checkpoint in output_dir, with the settings of that run
    overwrite: bool = False  # replace the run in output_dir

    def __post_init__(self):
        counts = "lora_rank model_max_length per_device_train_batch_size gradient_accumulation_steps logging_steps"
        not_negative = "max_steps weight_decay max_grad_norm save_steps save_total_limit eval_steps samples seed hsdp"
        for names, ok, need in (
            (counts, lambda x: x >= 1, "at least 1"),
            (not_negative, lambda x: x >= 0, "0 or more"),
            ("lora_dropout eval_split warmup_ratio adam_beta1 adam_beta2", lambda x: 0 <= x < 1, "at least 0 and below 1"),
            ("num_train_epochs adam_epsilon lora_alpha", lambda x: x > 0, "above 0"),
            ("learning_rate", lambda x: x is None or x >= 0, "0 or more"),
        ):
            for name in names.split():
                if not ok(getattr(self, name)):
                    raise RunError(f"--{name} must be {need}, not {getattr(self, name)}")
        if self.pure_bf16 and (self.method != "full" or self.optim != "adamw_8bit" or self.dtype not in ("auto", "bf16")):
            raise RunError(
                "--pure_bf16 is for --method full --optim adamw_8bit: plain rounding to bf16 loses small updates, and fp16 "
                "weights would overflow"
            )
        if (self.cpu_offload or self.hsdp) and not self.fsdp:
            raise RunError(f"--{'cpu_offload' if self.cpu_offload else 'hsdp'} is a part of --fsdp True")
        if self.optimizer_in_backward and (self.gradient_accumulation_steps > 1 or self.max_grad_norm or self.dtype == "fp16"):
            raise RunError(
                "--optimizer_in_backward never has the whole gradient: it needs --max_grad_norm 0, "
                "--gradient_accumulation_steps 1 and no fp16"
            )
        if self.method == "qlora" and self.quantize != "nf4":
            raise RunError(f"--method qlora is lora with --quantize nf4, not {self.quantize}")
        if self.method == "full" and self.quantize != "none":
            raise RunError(f"--quantize {self.quantize} freezes the weights and --method full trains them: use lora")
        if len({Path(path).stem for path in self.eval_data}) < len(self.eval_data):
            raise RunError("--eval_data names two files alike, and the log could not tell their losses apart: rename one")
        if self.eval_data and self.eval_split:
            raise RunError("--eval_data and --eval_split both name what is held out: give one")
        if self.resume and self.overwrite:
            raise RunError("--resume goes on with a run and --overwrite replaces it: give one")
        if self.load_best_model_at_end and not (self.eval_data or self.eval_split):
            raise RunError("--load_best_model_at_end needs held-out data to judge by: --eval_data or --eval_split")


# What may differ when a run is resumed: nothing that changes the losses.
FREE_TO_CHANGE = {"output_dir", "device", "fsdp", "cpu_offload", "hsdp", "save_steps", "save_total_limit", "logging_steps"}
FREE_TO_CHANGE |= {"resume", "overwrite"}


def complete(given: dict) -> TrainConfig:
    """The settings of a run from the flags given: defaults, or with --resume those that the run was started with.

    Paths become absolute, so that run.json means the same wherever it is read."""
    given = with_tuples(given)
    for name in {"model", "tokenizer"} & given.keys():
        given[name] = os.path.abspath(given[name])
    if (given.get("template") or "").endswith(".json"):
        given["template"] = os.path.abspath(given["template"])
    for name in {"data", "eval_data"} & given.keys():
        given[name] = tuple(map(os.path.abspath, given[name]))
    folder = Path(given.get("output_dir") or f"runs/{given.get('method', TrainConfig.method)}")
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and (folder / "run.json").exists():
        given = {name: value for name, value in given.items() if name != "overwrite"} | {"resume": True}  # --max-restarts
    if given.get("resume"):
        saved = with_tuples(read_run(folder))
        for name, value in given.items():
            if name not in FREE_TO_CHANGE and value != saved[name]:
                raise RunError(
                    f"--{name} {value}: the run in {folder} was started with {saved[name]}, and a resumed run is the same run"
                )
        given = saved | given
    elif "data" not in given and given.get("model", str(TINY)) != str(TINY):
        raise RunError(f"--model {given['model']} needs --data, the records to train it on")
    elif not {"data", "eval_split"} & given.keys():
        # The embedded default brings held-out questions, and as a control questions that nobody can answer.
        given = {"eval_data": (str(TINY / "held_out.jsonl"), str(TINY / "never_told.jsonl")), "exact_match": True} | given
    if given.get("method") == "qlora":
        given = {"quantize": "nf4"} | given
    return TrainConfig(**given | {"output_dir": str(folder)})


def read_run(folder: Path) -> dict:
    """The settings in a run's run.json."""
    try:
        settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]
    except FileNotFoundError:
        raise RunError(f"nothing to resume: {folder} holds no run (--output_dir names its folder)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder / 'run.json'} is not what train.py writes: {error}") from None
    differ = settings.keys() ^ {field.name for field in dataclasses.fields(TrainConfig)} - {"resume", "overwrite"}
    if differ:
        raise RunError(f"{folder} was begun by another version of train.py, which differs in {', '.join(sorted(differ))}")
    return settings


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
    options = {"device": device, "dtype": dtype, "attention": config.attention, "quantize": quantizer(config, sizes)}
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


def quantizer(config: TrainConfig, sizes: ModelConfig | None):
    """What makes a packed linear of a weight. Processes that load the same weights pack them together, each its part of every one
    (one core takes 7 minutes for 7B); a rehearsal (sizes given) is alone."""
    linear = QUANTIZERS[config.quantize]
    if linear is not NF4Linear or sizes or not dist.is_initialized():
        return linear
    return type("NF4Linear", (NF4Linear,), {"among": (dist.get_rank(), dist.get_world_size(), dist.all_reduce)})


def sharding(config: TrainConfig, device: torch.device, workers: "Workers"):
    """FSDP ("PyTorch FSDP", section 3; ZeRO, section 5.3): each process keeps 1/N of every block, of its gradients and of its
    optimizer state. A block is gathered for its forward, given back, gathered again for its backward; each then keeps the sum of
    its share of the gradients. Packed NF4 is cut as the bytes it is. Returns what shards a module, or None."""
    if not config.fsdp:
        return None
    if workers.world == 1:
        raise RunError("--fsdp shares a model out over several processes: torchrun --nproc_per_node N train.py ...")
    dtype = computed_in(config, device)
    if config.hsdp and workers.world % config.hsdp:
        raise RunError(f"--hsdp {config.hsdp}: {workers.world} processes are not whole groups of {config.hsdp}")
    mesh = {"copies": workers.world // config.hsdp, "shards": config.hsdp} if config.hsdp else {"shards": workers.world}
    options = {"mesh": init_device_mesh(device.type, tuple(mesh.values()), mesh_dim_names=tuple(mesh))}
    if config.method == "full" and dtype != torch.float32:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if config.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    return partial(fully_shard, **options)


def in_parallel(config: TrainConfig, model: Llama, workers: "Workers"):
    """The model as it is called in training: with a whole copy in each process, inside DDP, which has the gradients in its own
    buckets only."""
    if workers.world == 1 or config.fsdp:
        return model
    if config.optimizer_in_backward:
        raise RunError("--optimizer_in_backward needs one process, or --fsdp True: DDP sums gradients that it then no longer has")
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that the processes hold together. All of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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


def precision(config: TrainConfig, dtype: torch.dtype, device: torch.device):
    """(scaler, autocast): what keeps fp16's small gradients from becoming 0, and what casts fp32 masters where they are used."""
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
    """The rate of step 0, 1, ..., total - 1: a straight rise over the warm-up, then the schedule down to 0."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.lr_scheduler_type == "constant":
        return peak
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (1 - progress if config.lr_scheduler_type == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


def step_seed(seed: int, step: int, rank: int) -> int:
    """What a step draws its dropout from, whatever ran before it."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])


class Workers:
    """The processes of torchrun: how many, which one this is, and sums over all. One process needs no torchrun and no group."""

    def __init__(self, device: torch.device, world: int | None = None):
        self.world, self.rank = world or int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if self.world > 1 and not dist.is_initialized():
            # torchrun's store outlives the processes that --max-restarts begins anew and still holds the addresses of the dead:
            # each attempt gets names of its own in it. A process that died is noticed within ten minutes at the latest.
            timeout = timedelta(minutes=10)
            store = next(dist.rendezvous("env://", timeout=timeout))[0]
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world, timeout=timeout)

    def sum(self, value: float) -> float:
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def gather(self, values: list) -> list:
        """All ranks' lists as one, where rank r had taken elements r, r + world, ... of it."""
        if self.world == 1:
            return values
        parts = [None] * self.world
        dist.all_gather_object(parts, values)
        return [parts[i % self.world][i // self.world] for i in range(sum(map(len, parts)))]

    def wait(self):
        if self.world > 1:
            dist.barrier()


@dataclass
class Data:
    """What a run reads: the tokenizer and template, the rows to train on, and what is held out."""

    tokenizer: Tokenizer
    template: Template
    template_name: str
    batches: PackedBatches
    held_out: dict[str, list]  # dialogs by the name of their file
    evaluations: dict[str, PackedBatches]  # the same, as rows


def read_data(config: TrainConfig, say) -> Data:
    """Read, check and tokenise every record, so that a bad one stops the program before the model is even loaded."""
    tokenizer = Tokenizer(tokenizer_file(config))
    if config.template is not None:
        load_template(config.template)  # an unknown name is refused before anything is read, and so are those of files:
    inputs = [parse_input(given) for given in config.data]
    for path in config.eval_data:
        reader_of(Path(path))

    def read(path):
        return read_records(path, config.source, config.target, config.system)

    def numbered():
        """(number, record, how often it is seen) of all the data, read anew each time so that it need not fit in memory."""
        records = ((record, weight) for path, weight in inputs for record in read(path))
        return ((number, record, copies(weight, number, config.seed)) for number, (record, weight) in enumerate(records))

    # Once through everything, keeping nothing: a bad record is found before anything is tokenised. What is large and was found
    # good is not read again, and of the processes on a machine only the first reads it and only the first tokenises it.
    def count_kinds():
        return Counter(record.kind for _, record, _ in numbered())

    files, weights = zip(*inputs, strict=True)
    if known := cache_folder(files, tokenizer, "kinds", config.source, config.target, config.system):
        once(known, lambda folder: (folder / "kinds.json").write_text(json.dumps(count_kinds())))
        kinds = json.loads((known / "kinds.json").read_text())
    else:
        kinds = count_kinds()
    total = sum(kinds.values())
    held_out = {Path(path).stem: [record.dialog for record in read(path)] for path in config.eval_data}
    chosen = {}  # held-out dialogs by number, in the order drawn
    if config.eval_split:
        order = np.random.default_rng(config.seed).permutation(total)
        chosen = dict.fromkeys(order[: max(1, round(config.eval_split * total))].tolist())
        if len(chosen) == total:
            raise DataError(f"--eval_split {config.eval_split} of {total} records leaves none to train on")
        chosen.update((number, record.dialog) for number, record, _ in numbered() if number in chosen)
        held_out = {"held_out": list(chosen.values())}
    template, name, why = choose_template(kinds, config.template)
    if config.template is None:
        say(f"template {name}: {why}")

    def pack(name, dialogs, shuffle, cache=None):
        how = {"max_length": config.model_max_length, "too_long": config.too_long, "train_on_inputs": config.train_on_inputs}
        documents, fates = encode_documents(dialogs, tokenizer, template, **how, cache=cache)
        if not documents:
            raise DataError(f"{name}: nothing to learn from: {', '.join(f'{count:,} {fate}' for fate, count in fates.items())}")
        batches = PackedBatches(documents, config.per_device_train_batch_size * config.model_max_length, config.seed, shuffle)
        tokens, supervised = sum(batches.sizes), sum(batches.supervised)
        full = tokens / (len(batches) * batches.row_tokens)
        in_order = sorted(fates.items(), key=lambda item: item[0] != "kept")
        say(f"{name}: " + ", ".join(f"{count:,} {fate}" for fate, count in in_order))
        say(
            f"  {tokens:,} tokens, {supervised:,} supervised, in {len(batches):,} rows of {batches.row_tokens:,}, {full:.0%} full"
        )
        return batches

    decides = "source target system model_max_length too_long train_on_inputs eval_split seed".split()
    seen = chain.from_iterable(repeat(record.dialog, times) for number, record, times in numbered() if number not in chosen)
    cache = cache_folder(files, tokenizer, template, weights, *(getattr(config, name) for name in decides))
    batches = pack(", ".join(Path(path).name for path in config.data), seen, True, cache)
    evaluations = {name: pack(name, records, shuffle=False) for name, records in held_out.items()}
    return Data(tokenizer, template, name, batches, held_out, evaluations)


def tokenizer_file(config: TrainConfig) -> Path:
    return Path(config.tokenizer or Path(config.model) / "tokenizer.model")


# ---------------------------------------------------------------------------------------------------------------------
# A step, and what is measured between steps


def training_step(config, model, optimizer, scaler, micro_batches, rate: float, workers: Workers, autocast):
    """One optimizer step over this rank's micro-batches. Returns (loss, gradient norm, supervised tokens) of the whole step.

    Raises NotFinite when the loss or the gradient is not a finite number, before a weight is touched."""
    supervised = workers.sum(sum(int((batch["labels"] != IGNORE).sum()) for batch in micro_batches))
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss_sum = 0.0
    for i, batch in enumerate(micro_batches):
        # DDP averages the gradients of all ranks in backward. Only the last micro-batch needs that; x world turns it into a sum.
        # FSDP does it each time: the gradient of a whole model has no room to wait.
        hold = isinstance(model, DistributedDataParallel) and i < len(micro_batches) - 1
        with model.no_sync() if hold else contextlib.nullcontext():
            with autocast():
                loss = model(**{name: x.to(workers.device, non_blocking=True) for name, x in batch.items()})
            if config.optimizer_in_backward:
                summed_finite(float(loss.detach()), workers)  # now: after backward the weights have moved
            scaler.scale(loss * (workers.world / supervised)).backward()
        loss_sum += loss.detach()
    loss = summed_finite(float(loss_sum), workers) / supervised
    if config.optimizer_in_backward:
        return loss, None, int(supervised)

    scaler.unscale_(optimizer)
    trained = [p for p in model.parameters() if p.requires_grad]
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm or math.inf)).item()
    if not math.isfinite(grad_norm) and not scaler.is_enabled():  # in fp16 the scaler skips such a step and lowers its scale
        raise NotFinite(f"the gradient is {grad_norm}")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm, int(supervised)


class NotFinite(RunError):
    """A loss or a gradient that is NaN or infinite; `ranks` are those whose own it was."""

    ranks: tuple[int, ...] = ()


def summed_finite(loss: float, workers: Workers) -> float:
    """The sum of a loss over all ranks. Raises NotFinite on every rank if that of any is not finite."""
    total = workers.sum(loss)
    if not math.isfinite(total):
        error = NotFinite(f"the loss is {total}")
        finite = workers.gather([math.isfinite(loss)])
        error.ranks = tuple(rank for rank, fine in enumerate(finite) if not fine)
        raise error
    return total


def step_in_backward(model: Llama, optimizer) -> None:
    """Have every weight stepped as soon as its gradient is complete, and the gradient forgotten: only one of them exists at a
    time, and the optimizer passes over the weights that have none."""

    def step(weight):
        optimizer.step()
        weight.grad = None

    for weight in model.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(step)


@torch.no_grad()
def evaluate(model: Llama, batches: PackedBatches, workers: Workers, autocast) -> float:
    """Mean cross-entropy per supervised token of all rows, in nats. Each rank reads its share."""
    model.eval()
    loss, supervised = 0.0, 0
    for first in range(0, len(batches), workers.world):  # past the last row a batch is empty: all ranks take as many turns
        batch = batches.batch(0, first + workers.rank)
        supervised += int((batch["labels"] != IGNORE).sum())
        with autocast():
            loss += model(**{name: x.to(workers.device) for name, x in batch.items()}).item()
    model.train()
    return workers.sum(loss) / workers.sum(supervised)


@dataclass
class Rehearsal:
    """A run for memory.py to watch: the same build, step and evaluation, on random weights and rows that cost the most,
    one document each with every position supervised. The rows exist before it watches; the rest is made by `build()`."""

    config: TrainConfig
    sizes: ModelConfig
    device: torch.device
    for_gpu: bool = False  # with CUDA's attention, which keeps other tensors than the CPU's
    supervised: int | None = None  # positions with a label, if that is known
    processes: int = 1

    def __post_init__(self):
        tokens = self.config.per_device_train_batch_size * self.config.model_max_length
        row = torch.zeros(tokens, dtype=torch.int64)
        self.row = {"tokens": row, "labels": row.clone(), "cu_seqlens": torch.tensor([0, tokens], dtype=torch.int32)}

    def connect(self):
        self.workers = Workers(self.device, self.processes)
        self.shard = sharding(self.config, self.device, self.workers)

    def build(self):
        """(model, optimizer), and with them what `step` and `evaluate` need."""
        self.model = build(self.config, self.device, self.sizes, self.shard)
        dtype = computed_in(self.config, self.device)
        if self.for_gpu and self.config.attention == "sdpa" and dtype != torch.float32:
            for layer in self.model.layers:
                layer.attention.method = "varlen"
        self.optimizer = make_optimizer(self.config, self.model)
        self.scaler, self.autocast = precision(self.config, dtype, self.device)
        self.parallel = in_parallel(self.config, self.model, self.workers)
        if self.config.optimizer_in_backward:
            step_in_backward(self.model, self.optimizer)
        self.model.train()
        return self.model, self.optimizer

    def step(self):
        rows = [self.row] * self.config.gradient_accumulation_steps
        training_step(self.config, self.parallel, self.optimizer, self.scaler, rows, 1e-4, self.workers, self.autocast)

    def evaluate(self):
        evaluate(self.model, self, self.workers, self.autocast)

    def save(self):
        for weight in trained_weights(self.model).values():  # as save_final compares what it wrote
            whole(weight).to(computed_in(self.config, self.device))

    def __len__(self):  # the one row that evaluate() asks for, as of a PackedBatches
        return 1

    def batch(self, epoch: int, index: int):
        return self.row


class Memory:
    """What memory.py says of this run: the peak predicted before it, measured in it, and why it ran out, if it did.

    On a GPU the allocator's own count is the measure; on a CPU the first two steps are run inside a tracker."""

    def __init__(self, config: TrainConfig, sizes: ModelConfig, data: Data, device: torch.device, workers: Workers):
        dtype = next(name for name, dtype in DTYPES.items() if dtype == computed_in(config, device))
        self.config, self.sizes, self.world = dataclasses.replace(config, dtype=dtype, compile=False), sizes, workers.world
        self.gpu = GPU.here(device) if device.type == "cuda" else None
        self.counted, self.line = Tracker(), None
        self.supervised = int(max(sum(data.batches.supervised[i] for i in row) for row in data.batches.rows))

    def predict(self) -> str:
        """Rehearse the run on fake tensors. What cannot be rehearsed is said, and stops nothing."""
        if self.config.hsdp:  # its groups cannot be made up beside the real ones
            return "memory: not predicted here for groups of shards; memory.py with the same flags predicts it"
        run = Rehearsal(self.config, self.sizes, torch.device("cpu"), self.gpu is not None, self.supervised, self.world)
        try:
            self.line = predict(run, self.gpu)
        except RuntimeError as error:  # fake tensors of another PyTorch may know other operations
            return f"memory: not predicted, {str(error).splitlines()[0]}"
        text = f"memory: {self.line.peak / 1e9:.3f} GB predicted at the peak, in the {self.line.highest.name}"
        if self.gpu:
            needed = self.line.reserved + self.gpu.context
            text += f"; {needed / 1e9:.2f} of {self.gpu.memory / 1e9:.2f} GB in nvidia-smi"
            if needed > self.gpu.memory:
                text += f"\nwarning: that does not fit: {self.explained()}"
        return text

    def watched(self, model: Llama, optimizer, micro_batches) -> Tracker:
        """The tracker to run a step in, told of what is there already."""
        states = (x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor))
        for tensor in chain(model.parameters(), states, *(batch.values() for batch in micro_batches)):
            self.counted.watch(tensor)
        return self.counted

    def measured(self) -> str:
        measured, how = self.counted.peak, "counted in the first two steps"
        if self.gpu:
            measured, how = torch.cuda.max_memory_allocated(), f"measured ({torch.cuda.max_memory_reserved() / 1e9:.3f} reserved)"
        if not measured or not self.line:
            return ""
        error = self.line.peak / measured - 1
        return f"memory: a peak of {measured / 1e9:.3f} GB {how}, {self.line.peak / 1e9:.3f} predicted, {error:+.1%} off"

    def explained(self, in_use: int | None = None) -> str:
        peak = self.line.peak if self.line else None
        return explain_out_of_memory(self.sizes, self.config, self.gpu, self.world, peak, in_use)


class Exam:
    """Held-out prompts, asked before and after training: the few that samples.md shows, or with exact_match all."""

    def __init__(self, config: TrainConfig, data: Data, model: Llama, workers: Workers):
        self.data, self.model, self.workers, self.all = data, model, workers, config.exact_match
        self.together = config.fsdp  # no rank can answer alone what it holds a part of: all answer all
        fitting = [(name, d) for name, dialogs in data.held_out.items() for d in dialogs if self.fits(d)]
        self.files, self.asked = [name for name, _ in fitting], [dialog for _, dialog in fitting]
        if config.exact_match and not self.asked:
            raise DataError("--exact_match needs held-out records that end on a reply: --eval_data or --eval_split")
        apart = max(1, len(self.asked) // max(1, config.samples))
        self.shown = range(0, len(self.asked), apart)[: config.samples]  # places in self.asked
        if not self.all:
            self.asked, self.files = ([of[i] for i in self.shown] for of in (self.asked, self.files))
            self.shown = range(len(self.asked))

    def fits(self, dialog: list[dict]) -> bool:
        """Whether there is a prompt, a reply to compare with, and room for one in the model's window."""
        if dialog[-1]["role"] != "assistant":
            return False
        prompt, _ = encode_dialog(dialog[:-1], self.data.tokenizer, self.data.template)
        return len(prompt) + 128 <= self.model.config.max_seq_len

    def ask(self) -> list[str]:
        """Greedy replies, shared out over the ranks. Where they are counted, a little longer than the reference is enough."""
        self.model.eval()
        replies = []
        for dialog in self.asked if self.together else self.asked[self.workers.rank :: self.workers.world]:
            limit = len(self.data.tokenizer.encode(dialog[-1]["content"])) + 8 if self.all else 128
            how = Sampling(max_new_tokens=limit)
            replies.append("".join(answer(self.model, self.data.tokenizer, self.data.template, dialog[:-1], how)).strip())
        self.model.train()
        return replies if self.together else self.workers.gather(replies)

    def grades(self, before: list[str], after: list[str]):
        """Yield, where all is asked, (file, questions, share answered word for word before, the same after)."""
        marks = [[reply == d[-1]["content"].strip() for reply, d in zip(rs, self.asked, strict=True)] for rs in (before, after)]
        for name in dict.fromkeys(self.files if self.all else ()):
            places = [i for i, file in enumerate(self.files) if file == name]
            yield name, len(places), *(sum(right[i] for i in places) / len(places) for right in marks)

    def write_samples(self, folder: Path, before: list[str], after: list[str]) -> None:
        lines = [
            "# Before and after",
            "",
            f"Held-out prompts, answered greedily before and after the training in `{folder.name}`.",
            "",
        ]
        for i in self.shown:
            *prompt, reference = self.asked[i]
            lines += [f"*{self.files[i]}*", ""]
            for message in prompt:
                lines += [f"**{message['role']}:** {message['content']}", ""]
            for title, text in (("reference", reference["content"]), ("before", before[i]), ("after", after[i])):
                lines += [f"- {title}: {' '.join(text.split()) or '(nothing)'}"]
            lines += ["", "---", ""]
        write_text(folder / "samples.md", "\n".join(lines))


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on the GPU, or that the process took of the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves in its folder


def save_final(config: TrainConfig, model: Llama, folder: Path, dtype: torch.dtype, workers: Workers) -> None:
    """Write the adapter (PEFT's format) or the model (Hugging Face's), and the tokenizer; read back, compare, put in place.

    Weights spread over ranks are gathered one by one: all ranks call this, the first writes."""
    with written_whole(folder / "final", workers) as temporary:
        first = workers.rank == 0
        if config.method != "full":
            options = {"rank": config.lora_rank, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
            held = {name: whole(weight.detach()).cpu() for name, weight in lora_parameters(model).items()}
            if first:
                rename = partial(to_hf, config=model.config)
                options |= {"base_model": config.model, "rslora": config.use_rslora, "weights": held}
                save_adapter(model, temporary, rename, **options)
                _, written = read_adapter(temporary, partial(from_hf, config=model.config))
            pairs = ((name, weight, lambda name=name: written[name]) for name, weight in held.items())
        else:
            save_hf(model, temporary, dtype=dtype, whole=whole, write=first)
            written = open_checkpoint(temporary, model.config) if first else {}
            held = ((name, whole(weight.detach()).to("cpu", dtype)) for name, weight in model.named_parameters())
            pairs = ((name, weight, written.get(name)) for name, weight in held)
        for name, weight, read in pairs:
            if first and not torch.equal(weight, read()):
                raise RunError(f"{name} read back from {temporary} is not what was written: is the disk sound?")
        if first:
            copy_tokenizer(config, temporary, model.config.max_seq_len)
    if first:
        for path in sorted((folder / "final").iterdir()):
            os.replace(path, folder / path.name)
        (folder / "final").rmdir()


def copy_tokenizer(config: TrainConfig, folder: Path, window: int) -> None:
    Tokenizer(tokenizer_file(config)).save(folder, window)
    for name in ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"):  # the base's own, where it has them
        if (Path(config.model) / name).is_file():
            shutil.copyfile(Path(config.model) / name, folder / name)


def plot_losses(folder: Path, rows: list[dict], say) -> None:
    try:
        import matplotlib
    except ImportError:
        return say("loss.png is not drawn: pip install matplotlib")
    matplotlib.use("Agg")  # no screen is needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for key in sorted({key for row in rows for key in row if key.endswith("loss")}, key=len):
        points = [(row["step"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*points, strict=True), label=key, marker="" if key == "loss" else "o")
    axes.set(xlabel="step", ylabel="loss, nats per supervised token", title=folder.name)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)
    pyplot.close(figure)


class Progress:
    """One line, rewritten at every step in a terminal and written at every logged step into a file."""

    def __init__(self, start: int, total: int, say):
        self.start, self.total, self.say = start, total, say
        self.terminal = sys.stdout.isatty()
        self.began = time.perf_counter()

    def show(self, step: int, loss: float, tokens_per_second: float, logged: bool) -> None:
        left = (time.perf_counter() - self.began) / (step - self.start) * (self.total - step)
        clock = f"{int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}"
        line = f"step {step}/{self.total}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {clock} left"
        if self.terminal:  # \r: back to the line's start; \033[K: clear what the longer last one left
            self.say(f"\r{line}\033[K", end="\n" if step == self.total else "", flush=True)
        elif logged:
            self.say(line, flush=True)

    def note(self, text: str) -> None:
        self.say(f"\r{text}\033[K" if self.terminal else text, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The run


def train(config: TrainConfig) -> list[dict]:
    """Read, build, loop, save. Returns the rows of log.jsonl.

    Raises DataError, CheckpointError, LoRAError or RunError, with one sentence about what the user can mend."""
    device = pick_device(config.device)
    workers = Workers(device)
    say = print if workers.rank == 0 else lambda *_, **__: None
    folder = Path(config.output_dir)
    check_folder(config, folder)
    sizes = read_config(config.model)
    window = sizes.max_seq_len
    if config.model_max_length > window:
        raise RunError(
            f"--model_max_length {config.model_max_length} is more than the {window} tokens the model was trained to read"
        )

    # Read and build.
    data = read_data(config, say)
    dtype = computed_in(config, device)
    memory = Memory(config, sizes, data, device, workers)
    if workers.rank == 0:
        say(memory.predict())
    try:
        return run(config, device, workers, data, dtype, memory, say)
    except torch.OutOfMemoryError:
        in_use = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory.counted.live
        raise RunError(memory.explained(in_use)) from None


def run(config: TrainConfig, device, workers: Workers, data: Data, dtype: torch.dtype, memory: Memory, say) -> list[dict]:
    """Build, loop, save: what may run out of a GPU's memory."""
    folder = Path(config.output_dir)
    model = build(config, device, shard=sharding(config, device, workers))
    pieces, known = data.tokenizer.vocab_size, model.config.vocab_size
    if pieces > known:
        raise DataError(f"{tokenizer_file(config)} has {pieces:,} tokens, the model in {config.model} knows {known:,}")
    optimizer = make_optimizer(config, model)
    scaler, autocast = precision(config, dtype, device)
    parallel = in_parallel(config, model, workers)
    if config.optimizer_in_backward:
        step_in_backward(model, optimizer)
    found = checkpoints(folder) if config.resume else []
    state = read_state(found[-1], model) if found else None
    # A step's rows are the run's, not the number of processes': that may be another when it is resumed.
    rows_per_step = state["rows_per_step"] if state else config.gradient_accumulation_steps * workers.world
    if rows_per_step % workers.world:
        raise RunError(f"a step of the run in {folder} has {rows_per_step} rows, which {workers.world} processes cannot share")
    steps_per_epoch = math.ceil(len(data.batches) / rows_per_step)
    total = config.max_steps or math.ceil(config.num_train_epochs * steps_per_epoch)
    peak = peak_learning_rate(config, model.config.dim)
    trained = sum(weight.numel() for weight in trained_weights(model).values())
    with torch.device("meta"):  # counted before quantisation packs several weights into a byte
        everything = sum(weight.numel() for weight in Llama(model.config).parameters())
    say(f"model: {config.model}, {everything:,} parameters, {trained:,} trained ({trained / everything:.2%})")
    say(
        f"  {config.method} on {workers.world} x {device.type}, {str(dtype)[6:]}, quantize {config.quantize}, "
        f"template {data.template_name}, "
        f"{total:,} steps of {rows_per_step * data.batches.row_tokens:,} tokens, learning rate {peak:.2e}"
    )

    exam = Exam(config, data, model, workers)
    before = exam.ask()

    # Begin, or go on where a checkpoint stands.
    start, best, rows = 0, math.inf, []
    if state:
        restore(found[-1], model, optimizer if state["step"] else None, workers)
        scaler.load_state_dict(state["scaler"])
        start, best, rows = state["step"], state["best"], state["rows"]
        say(f"resumed after step {start}")
    workers.wait()  # nothing is written before every rank has found all in order
    if workers.rank == 0:
        begin_folder(config, folder, rows, data.template_name, peak, total, workers.world, dtype)

    progress = Progress(start, total, say)

    def record(**row):
        rows.append(row)
        if workers.rank == 0:
            with open(folder / "log.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")

    def save(name, step, optimizer=None):
        about = {"step": step, "best": best, "rows": rows, "rows_per_step": rows_per_step, "scaler": scaler.state_dict()}
        write_checkpoint(folder / name, model, optimizer, workers, **about)

    def save_to_resume(step):
        save(f"checkpoint-{step}", step, optimizer)
        if workers.rank == 0 and config.save_total_limit:
            for old in checkpoints(folder)[: -config.save_total_limit]:
                shutil.rmtree(old)

    def run_evaluation(step):
        nonlocal best
        losses = {f"eval_{name}_loss": evaluate(model, batches, workers, autocast) for name, batches in data.evaluations.items()}
        if not losses:
            return
        record(step=step, epoch=step / steps_per_epoch, **losses)
        progress.note(f"after step {step}: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
        first = next(iter(losses.values()))
        if first < best:
            best = first
            if config.load_best_model_at_end:
                save("best", step)

    # The loop.
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model.train()
    tokens, seconds = 0, 0.0
    with StopSignal() as stop:
        if not state:
            run_evaluation(0)
            if config.save_steps:  # a rehearsal in full size: what cannot be saved is found out now, not after two days
                make_state(model, optimizer)
                save_to_resume(0)
                optimizer.state.clear()
        progress.began = time.perf_counter()
        for step in range(start + 1, total + 1):
            began = time.perf_counter()
            epoch, index = divmod(step - 1, steps_per_epoch)
            indices = range(index * rows_per_step + workers.rank, (index + 1) * rows_per_step, workers.world)
            micro_batches = [data.batches.batch(epoch, index) for index in indices]
            torch.manual_seed(step_seed(config.seed, step, workers.rank))
            rate = learning_rate(config, step - 1, total, peak)
            counting = device.type == "cpu" and workers.world == 1 and step <= start + 2
            with memory.watched(model, optimizer, micro_batches) if counting else contextlib.nullcontext():
                try:
                    loss, grad_norm, supervised = training_step(
                        config, parallel, optimizer, scaler, micro_batches, rate, workers, autocast
                    )
                except NotFinite as error:
                    raise RunError(explain_not_finite(error, step, data.batches, epoch, index, rows_per_step, workers)) from None
            seconds += time.perf_counter() - began
            tokens += workers.world * sum(int((batch["tokens"] != PAD_ID).sum()) for batch in micro_batches)
            logged = step % config.logging_steps == 0 or step == total
            progress.show(step, loss, tokens / seconds, logged)
            if logged:
                record(
                    step=step,
                    epoch=step / steps_per_epoch,
                    loss=loss,
                    learning_rate=rate,
                    grad_norm=grad_norm,
                    supervised_tokens=supervised,
                    tokens_per_second=round(tokens / seconds, 1),
                    peak_memory_bytes=peak_memory(device),
                )
                tokens, seconds = 0, 0.0
            if step == total or (config.eval_steps and step % config.eval_steps == 0):
                run_evaluation(step)
            stopping = workers.sum(float(stop.asked)) > 0 and step < total
            if stopping or (config.save_steps and step % config.save_steps == 0):
                save_to_resume(step)
            if stopping:
                raise Stopped(f"stopped after step {step} of {total}, which is saved: --resume --output_dir {folder} goes on")

    if workers.rank == 0 and (text := memory.measured()):
        say(text)

    # Save, then ask again.
    if config.load_best_model_at_end:
        state = read_state(folder / "best", model)
        restore(folder / "best", model, None, workers)
        say(f"the weights of step {state['step']} are taken: their held-out loss of {state['best']:.4f} is the lowest")
    save_final(config, model, folder, dtype, workers)
    say(f"saved in {folder}, read back and compared")
    after = exam.ask()
    for name, count, old, new in exam.grades(before, after):
        say(f"{name}: {old:.1%} of {count} answered exactly before, {new:.1%} after")
        record(step=total, eval_data=name, exact_match_before=old, exact_match_after=new)
    if workers.rank == 0:
        if exam.shown:
            exam.write_samples(folder, before, after)
            say(f"prompts and replies before and after: {folder / 'samples.md'}")
        plot_losses(folder, rows, say)
    workers.wait()  # a process that leaves early takes its connections from under the others
    return rows


class Stopped(Exception):
    """The run was asked to stop and did so after saving."""


class StopSignal:
    """Notes a first SIGTERM or Ctrl-C in `asked`, for the loop to finish its step and save; a second one interrupts at once."""

    def __enter__(self):
        self.asked, self.before = False, {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other one handle signals
            self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def explain_not_finite(error: NotFinite, step: int, batches: PackedBatches, epoch, index, rows_per_step, workers: Workers) -> str:
    where = ""
    for rank in error.ranks:
        rows = range(index * rows_per_step + rank, (index + 1) * rows_per_step, workers.world)
        documents = ", ".join(str(i + 1) for row in rows for i in batches.documents_in(epoch, row))
        where += f" on rank {rank} (documents {documents} of those kept)"
    return (
        f"{error} in step {step}{where}; the last checkpoint stands. Try a lower --learning_rate, or --dtype bf16 instead of fp16"
    )


def check_folder(config: TrainConfig, folder: Path) -> None:
    """Refuse, before anything is read, a folder that cannot be written or holds something: what is no run's stays as it is."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RunError(f"--output_dir {folder}: {there} is {'not writable' if there.is_dir() else 'a file'}")
    if folder.resolve() == Path(config.model).resolve():
        raise RunError(f"--output_dir {folder} is the folder of --model, which would be written over: name another")
    if (folder / "run.json").exists():
        if not (config.resume or config.overwrite):
            raise RunError(
                f"{folder} already holds a run: --resume goes on with it, --overwrite replaces it, --output_dir names another"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty and holds no run: name a new folder with --output_dir")


def begin_folder(config, folder: Path, rows, template_name: str, peak: float, total: int, processes: int, dtype) -> None:
    """Write what this run is (run.json) and its log up to here; with --overwrite, clear what the former run left."""
    folder.mkdir(parents=True, exist_ok=True)
    if config.overwrite:
        for old in (*checkpoints(folder), *folder.glob("best"), *folder.glob("*.tmp")):
            shutil.rmtree(old, ignore_errors=True)
        written = "adapter_config.json adapter_model.safetensors config.json tokenizer.model tokenizer_config.json tokenizer.json"
        shards = (path.name for path in folder.glob("model*.safetensors*"))
        for name in (*written.split(), "special_tokens_map.json", "samples.md", "loss.png", *shards):
            (folder / name).unlink(missing_ok=True)
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("resume", "overwrite")}
    run = {
        "base_model": config.model,
        "template": template_name,
        "learning_rate": peak,
        "steps": total,
        "processes": processes,
        "dtype": str(dtype),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__},
        "settings": settings,
    }
    write_text(folder / "run.json", json.dumps(run, indent=2) + "\n")
    write_text(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def main():
    rank = int(os.environ.get("RANK", 0))
    try:
        train(
            complete(
                parse_flags(TrainConfig, "Fine-tune Llama 2: full, LoRA or QLoRA, on a CPU, a GPU, or several with torchrun.")
            )
        )
    except (CheckpointError, DataError, LoRAError, RunError, OSError) as error:
        if rank:
            time.sleep(5)  # what befell all ranks, the first has said by now, and torchrun has ended this one
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
    main()
