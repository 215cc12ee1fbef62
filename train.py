"""Training: one loop for full fine-tuning and LoRA, on a CPU, a GPU, or several with torchrun.

    torchrun train.py --method lora                                   the embedded default, three minutes on two CPU cores
    torchrun train.py --model llama-2-7b --data mine.jsonl            your data, real weights

A step of fine-tuning:

    for each micro-batch:   loss = sum over supervised tokens of -log p(token) / supervised tokens in the whole step
                            backward: add d loss / d weight into .grad
    clip the gradient to length 1; AdamW moves each trained weight by about the learning rate; forget the gradient

The division by the step's own count, over every micro-batch and rank, is what makes accumulation and more GPUs change nothing:
a mean of means would weigh a token in a short reply more than one in a long reply.

Nothing here depends on what ran before but the weights and the optimizer: the data of a step is a function of (seed, step), so is
its dropout, so is the learning rate. That is all of exact resuming.
"""

import contextlib
import dataclasses
import json
import math
import os
import pickle
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel

from data import IGNORE, TEMPLATES, DataError, PackedBatches, Tokenizer, encode_documents, parse_flags, read_dialogs
from generate import TINY, answer, pick_device, pick_dtype, pick_template
from lora import LoRAError, add_lora, lora_parameters, read_adapter, save_adapter
from model import CheckpointError, Llama, from_hf, load_model, open_checkpoint, save_hf, to_hf


class RunError(ValueError):
    """A run that cannot start, go on, or be saved."""


@dataclass(frozen=True)
class TrainConfig:
    # What is trained
    model: str = str(TINY)  # folder with weights: Meta's consolidated.*.pth or Hugging Face's *.safetensors
    method: Literal["lora", "full"] = "lora"  # lora: small adapters beside frozen weights; full: every weight
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the computation; auto: bf16 on a GPU that has it, fp32 on a CPU
    attention: Literal["sdpa", "textbook"] = "sdpa"  # sdpa: PyTorch's fused kernel; textbook: the readable four lines
    gradient_checkpointing: bool = False  # compute each block again in backward instead of keeping its activations
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA if there, else CPU
    # LoRA
    lora_rank: int = 8  # r: the rank of each correction
    lora_alpha: float = 16.0  # the correction is scaled by alpha / r
    lora_dropout: float = 0.0  # share of the adapter's inputs zeroed in training
    lora_targets: tuple[str, ...] = ("all-linear",)  # names such as wq wv output, or all-linear: every linear of the blocks
    use_rslora: bool = False  # scale by alpha / sqrt(r) instead, for large ranks
    # Data
    data: tuple[str, ...] = (str(TINY / "instructions.jsonl"),)  # JSONL, JSON, CSV or .txt files of records
    source: str | None = None  # the field or column with the prompt, if it has a name of its own
    target: str | None = None  # the field or column with the reply
    template: str | None = None  # how a dialog is written out: llama2 (default), alpaca, plain
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
    weight_decay: float = 0.0  # AdamW's pull of every trained matrix towards zero
    adam_beta1: float = 0.9  # memory of AdamW's mean gradient
    adam_beta2: float = 0.999  # memory of its mean square
    adam_epsilon: float = 1e-8  # keeps its division finite
    max_grad_norm: float = 1.0  # longest gradient; 0: never clipped
    seed: int = 42  # draws the adapters, the order of the data, the dropout
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
        at_least_one = (
            "lora_rank",
            "model_max_length",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
        )
        not_negative = (
            "max_steps",
            "weight_decay",
            "max_grad_norm",
            "save_steps",
            "save_total_limit",
            "eval_steps",
            "samples",
            "seed",
        )
        shares = ("lora_dropout", "eval_split", "warmup_ratio", "adam_beta1", "adam_beta2")
        for names, ok, need in (
            (at_least_one, lambda x: x >= 1, "at least 1"),
            (not_negative, lambda x: x >= 0, "0 or more"),
            (shares, lambda x: 0 <= x < 1, "at least 0 and below 1"),
            (("num_train_epochs", "adam_epsilon", "lora_alpha"), lambda x: x > 0, "above 0"),
            (("learning_rate",), lambda x: x is None or x >= 0, "0 or more"),
            (("template",), lambda x: x is None or x in TEMPLATES, f"one of {', '.join(TEMPLATES)}"),
        ):
            for name in names:
                if not ok(getattr(self, name)):
                    raise RunError(f"--{name} must be {need}, not {getattr(self, name)}")
        if self.eval_data and self.eval_split:
            raise RunError("--eval_data and --eval_split both name what is held out: give one")
        if self.resume and self.overwrite:
            raise RunError("--resume goes on with a run and --overwrite replaces it: give one")
        if self.load_best_model_at_end and not (self.eval_data or self.eval_split):
            raise RunError("--load_best_model_at_end needs held-out data to judge by: --eval_data or --eval_split")


# What may differ when a run is resumed: nothing that changes the losses.
FREE_TO_CHANGE = {"output_dir", "device", "save_steps", "save_total_limit", "logging_steps", "resume", "overwrite"}


def complete(given: dict) -> TrainConfig:
    """The settings of a run from the flags given: defaults, or with --resume those that the run was started with."""
    if given.get("resume"):
        folder = Path(given.get("output_dir") or f"runs/{given.get('method', 'lora')}")
        if not (folder / "run.json").is_file():
            raise RunError(f"nothing to resume: {folder} holds no run (--output_dir names its folder)")
        saved = json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]
        saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        for name, value in given.items():
            if name not in FREE_TO_CHANGE and tuple_or(value) != saved[name]:
                raise RunError(
                    f"--{name} {value} differs from {saved[name]} in {folder}, and the resumed run would not be the same run"
                )
        given = saved | given | {"output_dir": str(folder), "overwrite": False}
    elif "data" not in given:  # the embedded default brings its own held-out questions, and a control that cannot be answered
        given = {"eval_data": (str(TINY / "held_out.jsonl"), str(TINY / "never_told.jsonl")), "exact_match": True} | given
    given = {name: tuple_or(value) for name, value in given.items()}
    config = TrainConfig(**given)
    return dataclasses.replace(config, output_dir=config.output_dir or f"runs/{config.method}")


def tuple_or(value):
    return tuple(value) if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------------------------------------
# The pieces


def build(config: TrainConfig, device: torch.device) -> Llama:
    """The model ready to train: loaded in the format of the method, adapted, its trainable weights in fp32.

    lora: frozen weights in the dtype of the computation, adapters in fp32. full: every weight in fp32 ("masters"), cast to
    the dtype of the computation where they are used, because bf16's 8 bits would lose most of AdamW's small updates."""
    dtype = pick_dtype(config.dtype, device)
    model = load_model(
        config.model, device=device, dtype=dtype if config.method == "lora" else torch.float32, attention=config.attention
    )
    model.gradient_checkpointing = config.gradient_checkpointing
    if config.method == "lora":
        torch.manual_seed(config.seed)  # every rank draws the same A
        add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets, config.use_rslora)
    return model


def make_optimizer(config: TrainConfig, model: Llama) -> torch.optim.AdamW:
    """AdamW ("Decoupled Weight Decay Regularization", algorithm 2) over what is trained; only matrices decay, never norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,  # set at every step
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=trained[0].device.type in ("cpu", "cuda"),  # one pass over memory instead of a dozen
    )


def peak_learning_rate(config: TrainConfig, dim: int) -> float:
    """The peak given, or the usual one for 7B carried over to this width: the best rate of Adam falls as 1 / width
    ("Tensor Programs V", table 3)."""
    if config.learning_rate is not None:
        return config.learning_rate
    return (2e-4 if config.method == "lora" else 2e-5) * 4096 / dim


def learning_rate(config: TrainConfig, step: int, total: int, peak: float) -> float:
    """The rate of step 0, 1, ..., total - 1: a straight rise over the warm-up, then the schedule down to 0."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.lr_scheduler_type == "constant":
        return peak
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (1 - progress if config.lr_scheduler_type == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


class Workers:
    """The processes of torchrun: how many, which one this is, and sums over all. One process needs no torchrun and no group."""

    def __init__(self, device: torch.device):
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def sum(self, value: float) -> float:
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def gather(self, values: list) -> list:
        """The lists of all ranks, dealt back in the order in which rank r had taken elements r, r + world, ..."""
        if self.world == 1:
            return values
        parts = [None] * self.world
        dist.all_gather_object(parts, values)
        return [parts[i % self.world][i // self.world] for i in range(sum(map(len, parts)))]

    def wait(self):
        if self.world > 1:
            dist.barrier()


@torch.no_grad()
def evaluate(model: Llama, batches: PackedBatches, workers: Workers, autocast) -> float:
    """Mean cross-entropy per supervised token of all rows, in nats. Each rank reads its share."""
    model.eval()
    loss, supervised = 0.0, 0
    for index in range(workers.rank, len(batches), workers.world):
        batch = batches.batch(0, index)
        supervised += int((batch["labels"] != IGNORE).sum())
        with autocast():
            loss += model(**{name: x.to(workers.device) for name, x in batch.items()}).item()
    model.train()
    return workers.sum(loss) / workers.sum(supervised)


def answer_all(model: Llama, tokenizer, template, dialogs, workers: Workers, max_new_tokens=None) -> list[str]:
    """The greedy replies to the last user turn of each dialog. Without max_new_tokens, as long as the reference and a little more."""
    model.eval()
    replies = []
    for dialog in dialogs[workers.rank :: workers.world]:
        limit = max_new_tokens or len(tokenizer.encode(dialog[-1]["content"])) + 8
        replies.append("".join(answer(model, tokenizer, template, dialog[:-1], limit)).strip())
    model.train()
    return workers.gather(replies)


# ---------------------------------------------------------------------------------------------------------------------
# Files. Whatever is written is written beside its place and renamed when it is whole, so a crash leaves the old or the new.


@contextlib.contextmanager
def written_whole(folder: Path):
    """A new folder to write into. It gets its name when all is written, and is on the disk then; or it is gone."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if folder.exists():  # only best/ is ever replaced: keep the old one until the new one has the name
            folder.rename(folder.with_name(folder.name + ".old.tmp"))
        temporary.rename(folder)
        shutil.rmtree(folder.with_name(folder.name + ".old.tmp"), ignore_errors=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, CheckpointError | LoRAError):
            raise
        reason = str(error).splitlines()[0]
        free = shutil.disk_usage(folder.parent).free
        raise RunError(f"could not write {folder} ({free / 1e9:.2f} GB free on its disk): {reason}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def trained_weights(model: Llama) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted((p for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()), key=lambda p: int(p.name[11:]))


def load_state(path: Path) -> dict:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise RunError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def restore_weights(model: Llama, weights: dict[str, torch.Tensor]) -> None:
    own = trained_weights(model)
    if own.keys() != weights.keys():
        raise RunError("the checkpoint holds other weights than this run trains")
    for name, weight in weights.items():
        own[name].copy_(weight)


def save_final(config: TrainConfig, model: Llama, tokenizer_file: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the adapter (PEFT's format) or the model (Hugging Face's) and the tokenizer, read them back, compare, move into place."""
    with written_whole(folder / "final") as temporary:
        hf = partial(to_hf, config=model.config)
        if config.method == "lora":
            save_adapter(
                model,
                temporary,
                hf,
                base_model=config.model,
                rank=config.lora_rank,
                alpha=config.lora_alpha,
                dropout=config.lora_dropout,
                rslora=config.use_rslora,
            )
            written = {
                name: (lambda t=t: t) for name, t in read_adapter(temporary, partial(from_hf, config=model.config))[1].items()
            }
            held, dtype = lora_parameters(model), torch.float32
        else:
            save_hf(model, temporary, dtype=dtype)
            written, held = open_checkpoint(temporary, model.config), dict(model.named_parameters())
        for name, weight in held.items():
            if not torch.equal(written[name](), weight.detach().to("cpu", dtype)):
                raise RunError(f"{name} read back from {temporary} is not what was written; the disk or its driver is at fault")
        shutil.copyfile(tokenizer_file, temporary / "tokenizer.model")
        tokenizer = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        tokenizer |= {"add_bos_token": True, "add_eos_token": False, "legacy": True, "model_max_length": model.config.max_seq_len}
        write_json(temporary / "tokenizer_config.json", tokenizer)
    for path in sorted((folder / "final").iterdir()):
        os.replace(path, folder / path.name)
    (folder / "final").rmdir()


def write_samples(folder: Path, title: str, dialogs, before: list[str], after: list[str]) -> None:
    lines = [f"# {title}", "", "The same held-out prompts, answered greedily before and after training.", ""]
    for dialog, old, new in zip(dialogs, before, after, strict=True):
        for message in dialog[:-1]:
            lines += [f"**{message['role']}:** {message['content']}", ""]
        parts = (("reference", dialog[-1]["content"]), ("before", old), ("after", new))
        lines += [f"- {name}: `{' '.join(text.split()) or '(nothing)'}`" for name, text in parts] + ["", "---", ""]
    (folder / "samples.md").write_text("\n".join(lines), encoding="utf-8")


def plot_losses(folder: Path, rows: list[dict]) -> None:
    try:
        import matplotlib
    except ImportError:
        print("loss.png: not drawn (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for key in sorted({key for row in rows for key in row if key.endswith("loss")}, key=lambda key: key != "loss"):
        points = [(row["step"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*points, strict=True), label=key, marker="o" if key != "loss" else None)
    axes.set(xlabel="step", ylabel="nats per supervised token", title=folder.name)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)
    pyplot.close(figure)


class Progress:
    """One line that is rewritten in a terminal, and one line per logged step in a file."""

    def __init__(self, total: int, start: int, quiet: bool):
        self.total, self.start, self.quiet = total, start, quiet
        self.terminal = sys.stdout.isatty()
        self.began = time.perf_counter()

    def show(self, step: int, loss: float, tokens_per_second: float, logged: bool) -> None:
        if self.quiet or not (self.terminal or logged):
            return
        left = (time.perf_counter() - self.began) / (step - self.start) * (self.total - step)
        line = f"step {step}/{self.total}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {left // 60:.0f}:{left % 60:02.0f} left"
        print(f"\r{line}\033[K" if self.terminal else line, end="" if self.terminal else "\n", flush=True)

    def say(self, line: str) -> None:
        if not self.quiet:
            print(f"\r\033[K{line}" if self.terminal else line, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The run


def train(config: TrainConfig) -> list[dict]:
    """Run it all: read, build, loop, save. Returns the rows of log.jsonl.

    Raises DataError, CheckpointError, LoRAError or RunError with one sentence for what the user can mend."""
    device = pick_device(config.device)
    workers = Workers(device)
    world, rank = workers.world, workers.rank
    dtype = pick_dtype(config.dtype, device)
    folder = Path(config.output_dir)
    if (folder / "run.json").exists() and not (config.resume or config.overwrite):
        raise RunError(
            f"{folder} already holds a run: go on with it (--resume), replace it (--overwrite), or name another --output_dir"
        )
    say = print if rank == 0 else lambda *_: None

    # Data. Every record is read and checked before the model is even loaded.
    tokenizer_file = Path(config.tokenizer or Path(config.model) / "tokenizer.model")
    tokenizer = Tokenizer(tokenizer_file)
    dialogs = list(chain.from_iterable(read_dialogs(path, config.source, config.target) for path in config.data))
    held_out = {Path(path).stem: list(read_dialogs(path, config.source, config.target)) for path in config.eval_data}
    if config.eval_split:
        order = np.random.default_rng(config.seed).permutation(len(dialogs))
        count = max(1, round(config.eval_split * len(dialogs)))
        held_out = {"held_out": [dialogs[i] for i in order[:count]]}
        dialogs = [dialogs[i] for i in sorted(order[count:])]
    template_name = config.template or ("plain" if dialogs and dialogs[0][0]["role"] == "text" else "llama2")
    template = pick_template(template_name)

    def pack(name, dialogs, **how):
        limits = {"max_length": config.model_max_length, "too_long": config.too_long, "train_on_inputs": config.train_on_inputs}
        documents, fates = encode_documents(dialogs, tokenizer, template, **limits)
        if not documents:
            raise DataError(f"{name}: none of the {len(dialogs)} records can be learned from: {dict(fates)}")
        batches = PackedBatches(documents, config.per_device_train_batch_size * config.model_max_length, config.seed, **how)
        tokens, supervised = sum(len(ids) for ids, _ in documents), sum(int((ls[1:] != IGNORE).sum()) for _, ls in documents)
        fill = tokens / (len(batches) * batches.row_tokens)
        say(
            f"{name}: {', '.join(f'{n:,} {fate}' for fate, n in sorted(fates.items(), reverse=True))}; {tokens:,} tokens, "
            f"{supervised:,} supervised, in {len(batches):,} rows of {batches.row_tokens:,} ({fill:.0%} full)"
        )
        return batches

    batches = pack("training data", dialogs)
    evaluations = {name: pack(name, records, shuffle=False) for name, records in held_out.items()}
    steps_per_epoch = math.ceil(len(batches) / (config.gradient_accumulation_steps * world))
    total = config.max_steps or math.ceil(config.num_train_epochs * steps_per_epoch)

    # Model.
    model = build(config, device)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise DataError(
            f"{tokenizer_file} has {tokenizer.vocab_size:,} tokens, the model in {config.model} only {model.config.vocab_size:,}"
        )
    optimizer = make_optimizer(config, model)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # keeps small fp16 gradients from becoming 0
    mixed = config.method == "full" and dtype != torch.float32
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=mixed)
    wrapped = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None) if world > 1 else model
    peak = peak_learning_rate(config, model.config.dim)
    trained = trained_weights(model)
    count = sum(p.numel() for p in trained.values())
    everything = sum(p.numel() for p in model.parameters())
    say(
        f"{config.model}: {everything:,} parameters, {count:,} trained ({count / everything:.2%}); {config.method}, "
        f"{str(dtype).removeprefix('torch.')} on {world} x {device.type}, learning rate {peak:.2e}, template {template_name}"
    )

    # Before: the questions to be asked again at the end.
    questions = [d for d in chain.from_iterable(held_out.values()) if d[-1]["role"] == "assistant" and d[0]["role"] != "text"]
    shown = questions[:: max(1, len(questions) // config.samples)][: config.samples] if config.samples else []

    def ask():
        """Replies to the shown prompts, and to every held-out record if exact matches are counted: {name: [(dialog, reply)]}."""
        if config.exact_match:
            return {
                name: list(zip(ds, answer_all(model, tokenizer, template, ds, workers), strict=True))
                for name, ds in held_out.items()
            }
        return {"shown": list(zip(shown, answer_all(model, tokenizer, template, shown, workers, 128), strict=True))}

    if config.exact_match and not questions:
        raise DataError("--exact_match needs held-out records that end on a reply: --eval_data or --eval_split")
    before = ask()

    # Where to begin.
    start, best, rows = 0, math.inf, []
    if config.resume:
        found = checkpoints(folder)
        if found:
            state = load_state(found[-1] / "state.pt")
            restore_weights(model, state["weights"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            start, best = state["step"], state["best"]
            if state["world"] != world:
                raise RunError(
                    f"{folder} was trained by {state['world']} processes, not {world}: the rows of a step would differ"
                )
            if (folder / "log.jsonl").exists():  # rows after the checkpoint will be made again
                logged = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
                rows = [row for row in logged if row["step"] <= start]
        say(f"resuming {folder} after step {start}")
    workers.wait()  # nobody writes before everybody has checked

    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if not config.resume:
            for old in (*folder.glob("checkpoint-*"), *folder.glob("best*")):
                shutil.rmtree(old)
        settings = {name: getattr(config, name) for name in vars(config) if name not in ("resume", "overwrite")}
        settings |= {name: os.path.abspath(settings[name]) for name in ("model", "tokenizer") if settings[name]}
        settings |= {name: [os.path.abspath(path) for path in settings[name]] for name in ("data", "eval_data")}
        versions = {"python": sys.version.split()[0], "torch": torch.__version__}
        run = {"base_model": os.path.abspath(config.model), "template": template_name, "settings": settings}
        run |= {"learning_rate": peak, "steps": total, "processes": world, "dtype": str(dtype), "versions": versions}
        write_json(folder / "run.json", run)
        (folder / "log.jsonl.tmp").write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(folder / "log.jsonl.tmp", folder / "log.jsonl")

    def record(row):
        rows.append(row)
        if rank == 0:
            with open(folder / "log.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")

    def save(name, **more):
        if rank == 0:
            with written_whole(folder / name) as temporary:
                torch.save(
                    {"weights": trained_weights(model), "step": step, "best": best, "world": world, **more},
                    temporary / "state.pt",
                )

    def run_evaluation(step):
        """Log the loss on every held-out file; keep the weights if the first one's is the lowest so far and that is asked for."""
        nonlocal best
        losses = {name: evaluate(model, rows_of, workers, autocast) for name, rows_of in evaluations.items()}
        if losses:
            record(
                {"step": step, "epoch": round(step / steps_per_epoch, 4)}
                | {f"eval_{name}_loss": loss for name, loss in losses.items()}
            )
            progress.say(f"after step {step}: " + ", ".join(f"{name} loss {loss:.4f}" for name, loss in losses.items()))
            first = next(iter(losses.values()))
            if first < best:
                best = first
                if config.load_best_model_at_end:
                    save("best")

    # The loop.
    model.train()
    progress = Progress(total, start, quiet=rank != 0)
    tokens_since, since = 0, time.perf_counter()
    step = start
    if start == 0:
        run_evaluation(0)
    try:
        for step in range(start + 1, total + 1):
            torch.manual_seed(hash((config.seed, step, rank)) % 2**63)  # dropout: a function of (seed, step, rank)
            first = ((step - 1) % steps_per_epoch) * config.gradient_accumulation_steps * world
            indices = range(first + rank, first + config.gradient_accumulation_steps * world, world)
            micro_batches = [batches.batch((step - 1) // steps_per_epoch, index) for index in indices]
            supervised = workers.sum(sum(int((batch["labels"] != IGNORE).sum()) for batch in micro_batches))
            loss_sum = 0.0
            for i, batch in enumerate(micro_batches):
                # DDP averages gradients over the ranks in backward: only the last micro-batch needs that, and x world makes it a sum.
                last = i == len(micro_batches) - 1
                with contextlib.nullcontext() if last or world == 1 else wrapped.no_sync():
                    with autocast():
                        loss = wrapped(**{name: x.to(device, non_blocking=True) for name, x in batch.items()})
                    scaler.scale(loss * world / supervised).backward()
                loss_sum += loss.detach()
            loss = workers.sum(float(loss_sum)) / supervised
            if not math.isfinite(loss):
                raise RunError(
                    f"the loss of step {step} is {loss}: stopped; try a lower --learning_rate, or --dtype bf16 instead of fp16"
                )

            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(trained_parameters(model), config.max_grad_norm or math.inf).item()
            if not math.isfinite(grad_norm) and not scaler.is_enabled():  # in fp16 the scaler skips such a step by itself
                raise RunError(f"the gradient of step {step} is {grad_norm}: stopped; try a lower --learning_rate")
            rate = learning_rate(config, step - 1, total, peak)
            for group in optimizer.param_groups:
                group["lr"] = rate
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            tokens_since += sum(int(batch["cu_seqlens"][-1]) for batch in micro_batches)
            logged = step % config.logging_steps == 0 or step == total
            speed = world * tokens_since / (time.perf_counter() - since)
            progress.show(step, loss, speed, logged)
            if logged:
                record(
                    {
                        "step": step,
                        "epoch": round(step / steps_per_epoch, 4),
                        "loss": loss,
                        "learning_rate": rate,
                        "grad_norm": grad_norm,
                        "supervised_tokens": int(supervised),
                        "tokens_per_second": round(speed, 1),
                        "peak_memory_bytes": peak_memory(device),
                    }
                )
                tokens_since, since = 0, time.perf_counter()
            if config.eval_steps and step % config.eval_steps == 0 and step < total:
                run_evaluation(step)
                since = time.perf_counter() - 1e-9
            if config.save_steps and step % config.save_steps == 0:
                save(f"checkpoint-{step}", optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
                if rank == 0 and config.save_total_limit:
                    for old in checkpoints(folder)[: -config.save_total_limit]:
                        shutil.rmtree(old)
    except KeyboardInterrupt:
        found = checkpoints(folder)
        rest = f"--resume goes on from {found[-1]}" if found else "no checkpoint had been saved yet"
        raise KeyboardInterrupt(f"stopped after step {step - 1} of {total}; {rest}") from None

    # After.
    if start < total:
        run_evaluation(total)
    if config.load_best_model_at_end:
        state = load_state(folder / "best" / "state.pt")
        restore_weights(model, state["weights"])
        progress.say(f"the weights of step {state['step']} are kept: the lowest held-out loss, {state['best']:.4f}")
    if rank == 0:
        save_final(config, model, tokenizer_file, folder, dtype)
    after = ask()
    say(f"saved in {folder}, read back and compared")
    if config.exact_match:
        for name in held_out:
            right = [sum(reply == d[-1]["content"].strip() for d, reply in answers[name]) for answers in (before, after)]
            n = len(held_out[name])
            say(f"{name}: {right[0]} of {n} answered exactly before ({right[0] / n:.1%}), {right[1]} after ({right[1] / n:.1%})")
            record({"step": total, "eval_data": name, "exact_match_before": right[0] / n, "exact_match_after": right[1] / n})
    if rank == 0 and shown:
        replies = [{id(d): reply for pairs in answers.values() for d, reply in pairs} for answers in (before, after)]
        write_samples(folder, f"{folder.name}: before and after", shown, *([r[id(d)] for d in shown] for r in replies))
        say(f"the same questions before and after: {folder / 'samples.md'}")
        for dialog in shown[:2]:
            say(
                f"  {dialog[-2]['content']}\n    before: {replies[0][id(dialog)][:100]}\n    after:  {replies[1][id(dialog)][:100]}"
            )
    if rank == 0:
        plot_losses(folder, rows)
    return rows


def trained_parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on the GPU, or that the process took of the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main():
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        train(complete(parse_flags(TrainConfig, "Fine-tune Llama 2: full or LoRA, on CPU, GPU, or several with torchrun.")))
    except (CheckpointError, DataError, LoRAError, RunError, OSError) as error:
        if speaks:
            print(f"\ntrain.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        if speaks:
            print(f"\ntrain.py: {stopped or 'stopped'}", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
