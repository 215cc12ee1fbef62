"""The folder of a run: what is checked before anything is written, the log as it grows, and what can be used in the end.

run.json              every setting, and what it takes to ask the model as it was trained
log.jsonl, loss.png   losses, rate and speed by step, and their picture
adapter_* or model*   the result, with its tokenizer: written beside, read back, compared, then put in place
checkpoint-N/         what --resume goes on from (checkpoint.py)
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data import DataError, Tokenizer
from helping.files import alone, peak_memory, writing
from lora import lora_parameters, read_adapter, save_adapter
from model import Llama, ModelConfig, from_hf, open_checkpoint, save_hf, to_hf
from running.checkpoint import checkpoints, trained_weights, write_text, written_whole
from running.reading import Data, tokenizer_file
from running.settings import RunError, check_processes, is_finished
from running.workers import Workers, whole
from weights.chat import write_chat_template


def check_start(config, sizes: ModelConfig, world: int) -> None:
    """Refuse, before anything is read, what cannot go well: more or fewer processes than the settings are for, rows or a
    tokenizer that the model does not know, weights that are not there, a folder that cannot be written or holds something. What
    is no run's stays."""
    check_processes(config, world)
    if config.model_max_length > sizes.max_seq_len:
        length, window = config.model_max_length, sizes.max_seq_len
        raise RunError(f"--model_max_length {length} is more than the {window} tokens the model was trained to read")
    file = tokenizer_file(config)
    if (pieces := Tokenizer(file).vocab_size) > (known := sizes.vocab_size):
        raise DataError(f"{file} has {pieces:,} tokens, the model in {config.model} knows {known:,}")
    open_checkpoint(config.model, sizes)  # which says what is missing or cut short; no tensor is read
    folder = Path(config.output_dir)
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


def alone_in(folder: Path, workers: Workers):
    """The folder for this run alone: RunError if another is at work in it."""
    busy = RunError(f"another run is at work in {folder}: name another with --output_dir")
    return alone(folder, busy) if workers.first else contextlib.nullcontext()


def describe(config, model: Llama, data: Data, plan, workers: Workers) -> str:
    with torch.device("meta"):  # counted before quantisation packs several weights into a byte
        everything = sum(weight.numel() for weight in Llama(model.config).parameters())
    trained = sum(weight.numel() for weight in trained_weights(model).values())
    known, pieces = model.config.vocab_size, data.tokenizer.vocab_size
    doubt = f"  the tokenizer has only {pieces:,} of the model's {known:,} tokens: is it this model's?\n"
    probe = "a  b\nﬁ"  # Llama 2's tokenizer leaves it as it is; others may take spaces together, or make lines spaces
    read = data.tokenizer.decode(data.tokenizer.encode(probe))
    other = f"  the tokenizer reads {probe!r} as {read!r}, which transformers may not: compare its tokens\n"
    return (
        f"model: {config.model}, {everything:,} parameters, {trained:,} trained ({trained / everything:.2%})\n"
        f"{doubt if known - pieces > 256 else ''}"  # a table may be padded to a round number
        f"{other if read != probe else ''}"
        f"  {config.method} on {workers.world} x {workers.device.type}, {str(plan.dtype)[6:]}, quantize {config.quantize}, "
        f"template {data.template_name}, {plan.total:,} steps of {plan.rows_per_step * data.batches.row_tokens:,} tokens, "
        f"learning rate {plan.peak:.2e}"
    )


def begin_folder(config, rows: list[dict], data: Data, plan, workers: Workers) -> None:
    """Write what this run is (run.json) and its log up to here; with --overwrite, clear what the former run left."""
    folder = Path(config.output_dir)
    if config.overwrite:
        for old in (*checkpoints(folder), *folder.glob("best"), *folder.glob("*.tmp")):
            shutil.rmtree(old, ignore_errors=True)
        written = "adapter_config.json adapter_model.safetensors config.json tokenizer.model tokenizer_config.json tokenizer.json"
        shards = (path.name for path in folder.glob("model*.safetensors*"))
        for name in (*written.split(), "special_tokens_map.json", "samples.md", "loss.png", *shards):
            (folder / name).unlink(missing_ok=True)
    run = {
        "base_model": config.model,
        "template": data.template_name,
        "learning_rate": plan.peak,
        "steps": plan.total,
        "processes": workers.world,
        "finished": False,
        "dtype": str(plan.dtype),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__},
        "settings": {name: value for name, value in dataclasses.asdict(config).items() if name not in ("resume", "overwrite")},
    }
    write_text(folder / "run.json", json.dumps(run, indent=2) + "\n")
    write_text(folder / "log.jsonl", "".join(as_line(row) for row in rows))


def finish_folder(folder: Path) -> None:
    """Note in run.json, as the last thing a run does, that all of it is there."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    write_text(folder / "run.json", json.dumps(run | {"finished": True}, indent=2) + "\n")


def finished(config) -> list[dict]:
    """The log of the run in config.output_dir if that came to its end and its model is still there; or nothing."""
    folder = Path(config.output_dir)
    if not is_finished(folder) or not list(folder.glob("*model*.safetensors")):
        return []
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def as_line(row: dict) -> str:
    """A row of log.jsonl. JSON knows no infinity, which is a gradient's length where fp16 ran over: it becomes null."""
    row = {key: value if not isinstance(value, float) or math.isfinite(value) else None for key, value in row.items()}
    return json.dumps(row) + "\n"


class Log:
    """log.jsonl, to which `rows` are added as they come, and one line of progress: rewritten at every step in a terminal, written
    at every logged step into a file."""

    def __init__(self, config, rows: list[dict], total: int, workers: Workers):
        self.folder, self.every = Path(config.output_dir), config.logging_steps
        self.rows, self.total, self.workers = rows, total, workers
        self.terminal = sys.stdout.isatty()
        self.tokens, self.seconds, self.began = 0, 0.0, None

    def record(self, **row) -> None:
        self.rows.append(row)
        if self.workers.first:
            path = self.folder / "log.jsonl"
            with writing(path), open(path, "a") as file:
                file.write(as_line(row))

    def step(self, step: int, tokens: int, seconds: float, **row) -> None:
        """Tell of a step that took so many seconds for so many tokens of all processes."""
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        self.began = self.began or (time.perf_counter() - seconds, step - 1)
        logged, speed = step % self.every == 0 or step == self.total, self.tokens / self.seconds
        left = int((time.perf_counter() - self.began[0]) / (step - self.began[1]) * (self.total - step))
        clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        line = f"step {step}/{self.total}  loss {row['loss']:.4f}  {speed:,.0f} tokens/s  {clock} left"
        if self.terminal:  # \r: back to the line's start; \033[K: clear what the longer last one left
            self.workers.say(f"\r{line}\033[K", end="\n" if step == self.total else "", flush=True)
        elif logged:
            self.workers.say(line, flush=True)
        if logged:
            memory = peak_memory(self.workers.device)
            self.record(step=step, **row, tokens_per_second=round(speed, 1), peak_memory_bytes=memory)
            self.tokens, self.seconds = 0, 0.0

    def judged(self, step: int, epoch: float, **losses) -> None:
        self.record(step=step, epoch=epoch, **losses)
        text = f"after step {step}: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        self.workers.say(f"\r{text}\033[K" if self.terminal else text, flush=True)

    def plot(self) -> None:
        """loss.png, where matplotlib is."""
        try:
            import matplotlib
        except ImportError:
            return self.workers.say("loss.png is not drawn: pip install matplotlib")
        matplotlib.use("Agg")  # no screen is needed
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 5))
        for key in sorted({key for row in self.rows for key in row if key.endswith("loss")}, key=len):
            points = [(row["step"], row[key]) for row in self.rows if key in row]
            axes.plot(*zip(*points, strict=True), label=key, marker="" if key == "loss" else "o")
        axes.set(xlabel="step", ylabel="loss, nats per supervised token", title=self.folder.name)
        axes.legend()
        with writing(self.folder / "loss.png"):
            figure.savefig(self.folder / "loss.png", dpi=120)
        pyplot.close(figure)


def save_final(config, model: Llama, data: Data, dtype: torch.dtype, workers: Workers) -> None:
    """Write the adapter (PEFT's format) or the model (Hugging Face's), and the tokenizer; read back, compare, put in place.

    Weights spread over ranks are gathered one by one: all ranks call this, the first writes."""
    folder = Path(config.output_dir)
    with written_whole(folder / "final", workers) as temporary:
        first = workers.first
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
            if first and not weight.isfinite().all():
                raise RunError(f"{name} holds NaN or infinity after the last step, and is not saved: lower --learning_rate")
            if first and not torch.equal(weight, read()):
                raise RunError(f"{name} read back from {temporary} is not what was written: is the disk sound?")
        if first:
            save_tokenizer(data, temporary, model.config.max_seq_len)
    if first:
        for path in sorted((folder / "final").iterdir()):
            os.replace(path, folder / path.name)
        (folder / "final").rmdir()


def save_tokenizer(data: Data, folder: Path, window: int) -> None:
    """The tokenizer as training had it. The base's own settings stay where they are: with another end token, another place of
    the leading space or tokens beyond tokenizer.model, transformers would ask in other tokens than were trained."""
    data.tokenizer.save(folder, window)
    write_chat_template(folder, data.template)
