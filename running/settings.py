"""The settings of a run: which go together, and which a resumed run takes from the one that was interrupted.

A mistake found here costs a second, and gets one sentence; the same mistake found after the weights are read costs minutes."""

import dataclasses
import json
import math
import os
from pathlib import Path

from generate import DTYPES
from helping.flags import with_tuples


class RunError(ValueError):
    """A run that cannot start, go on, or be saved."""


def check(config) -> None:
    """Raise RunError for a train.TrainConfig with a value out of range, or with two that exclude each other."""
    counts = "lora_rank model_max_length per_device_train_batch_size gradient_accumulation_steps logging_steps"
    not_negative = "max_steps max_grad_norm save_steps save_total_limit eval_steps samples hsdp"
    for names, ok, need in (
        (counts, lambda x: x >= 1, "at least 1"),
        (not_negative, lambda x: x >= 0, "0 or more"),
        ("lora_dropout eval_split warmup_ratio adam_beta1 adam_beta2", lambda x: 0 <= x < 1, "at least 0 and below 1"),
        ("num_train_epochs lora_alpha", lambda x: 0 < x < math.inf, "above 0 and finite"),
        ("adam_epsilon", lambda x: 1e-30 <= x < math.inf, "at least 1e-30, which fp32 tells from 0, and finite"),
        ("seed", lambda x: 0 <= x < 2**64, "at least 0 and below 2 ** 64"),
        ("learning_rate weight_decay", lambda x: x is None or 0 <= x < math.inf, "0 or more and finite"),
    ):
        for name in names.split():
            if not ok(getattr(config, name)):
                raise RunError(f"--{name} must be {need}, not {getattr(config, name)}")
    c, full, in_backward = config, config.method == "full", config.optimizer_in_backward
    tokens = c.per_device_train_batch_size * c.model_max_length
    for wrong, sentence in (
        (tokens > 2**27, f"a row of {tokens:,} tokens is more than any machine holds: lower --per_device_train_batch_size"),
        (
            c.pure_bf16 and (not full or c.optim != "adamw_8bit" or c.dtype not in ("auto", "bf16")),
            "--pure_bf16 is for --method full --optim adamw_8bit: plain rounding to bf16 loses small updates, and fp16 "
            "weights would overflow",
        ),
        (c.cpu_offload and not c.fsdp, "--cpu_offload is a part of --fsdp True"),
        (c.hsdp and not c.fsdp, "--hsdp is a part of --fsdp True"),
        (c.hsdp == 1, "--hsdp 1 gives every process a whole copy, which is a run without --fsdp"),
        (
            in_backward and (c.gradient_accumulation_steps > 1 or c.max_grad_norm or c.dtype == "fp16"),
            "--optimizer_in_backward never has the whole gradient: it needs --max_grad_norm 0, "
            "--gradient_accumulation_steps 1 and --dtype bf16 or fp32",
        ),
        (c.method == "qlora" and c.quantize != "nf4", f"--method qlora is lora with --quantize nf4, not {c.quantize}"),
        (
            full and c.quantize != "none",
            f"--quantize {c.quantize} freezes the weights and --method full trains them: use lora",
        ),
        (
            len({Path(path).stem for path in c.eval_data}) < len(c.eval_data),
            "--eval_data names two files alike, and the log could not tell their losses apart: rename one",
        ),
        (c.eval_data and c.eval_split, "--eval_data and --eval_split both name what is held out: give one"),
        (c.resume and c.overwrite, "--resume goes on with a run and --overwrite replaces it: give one"),
        (
            c.load_best_model_at_end and not (c.eval_data or c.eval_split),
            "--load_best_model_at_end needs held-out data to judge by: --eval_data or --eval_split",
        ),
    ):
        if wrong:
            raise RunError(sentence)


def check_processes(config, world: int) -> None:
    """Raise RunError for settings that so many processes cannot have."""
    if config.fsdp and world == 1:
        raise RunError("--fsdp shares a model out over several processes: torchrun --nproc_per_node N train.py ...")
    if config.hsdp and world % config.hsdp:
        raise RunError(f"--hsdp {config.hsdp}: {world} processes are not whole groups of {config.hsdp}")
    if config.optimizer_in_backward and world > 1 and not config.fsdp:
        raise RunError("--optimizer_in_backward needs one process, or --fsdp True: DDP sums gradients that it then no longer has")


# What may differ when a run is resumed: nothing that changes the losses.
FREE_TO_CHANGE = {"output_dir", "device", "fsdp", "cpu_offload", "hsdp", "save_steps", "save_total_limit", "logging_steps"}
FREE_TO_CHANGE |= {"async_save", "load_best_model_at_end", "resume", "overwrite"}


def completed(given: dict, defaults, restarted: bool = False) -> dict:
    """What is not said by the flags given: with --resume what the run was started with, without --data the embedded default's
    held-out questions. defaults: the class train.TrainConfig. restarted: by torchrun, which is to resume.

    Paths become absolute, so that run.json means the same wherever it is read."""
    given = with_tuples(given)
    for name in ("model", "tokenizer", "output_dir"):
        if given.get(name) == "":  # as of a shell's variable that is not set
            raise RunError(f"--{name} is empty: name a path")
    for name in {"model", "tokenizer"} & given.keys():
        given[name] = os.path.abspath(given[name])
    if (given.get("template") or "").endswith(".json"):
        given["template"] = os.path.abspath(given["template"])
    for name in {"data", "eval_data"} & given.keys():
        given[name] = tuple(map(os.path.abspath, given[name]))
    folder = Path(given.get("output_dir") or f"runs/{given.get('method', defaults.method)}")
    # --overwrite has been done by the processes before, unless the finished run that it is to replace is still there.
    if restarted and (folder / "run.json").exists() and not (given.get("overwrite") and is_finished(folder)):
        given = {name: value for name, value in given.items() if name != "overwrite"} | {"resume": True}
    if given.get("resume"):
        saved, began_in = read_run(folder, {field.name for field in dataclasses.fields(defaults)})
        for name, value in given.items():
            if name not in FREE_TO_CHANGE and value != saved[name]:
                was = "its default" if saved[name] is None else saved[name]
                raise RunError(f"--{name} {value}: the run in {folder} was started with {was}, and a resumed run is the same run")
        given = saved | given
        if given["dtype"] == "auto":  # on this device it could be another
            given["dtype"] = began_in
    elif "data" not in given and given.get("model", defaults.model) != defaults.model:
        raise RunError(f"--model {given['model']} needs --data, the records to train it on")
    elif not {"data", "eval_split"} & given.keys():
        # The embedded default brings held-out questions, and as a control questions that nobody can answer.
        tiny = Path(defaults.model)
        given = {"eval_data": (str(tiny / "held_out.jsonl"), str(tiny / "never_told.jsonl")), "exact_match": True} | given
    if given.get("method") == "qlora":
        given = {"quantize": "nf4"} | given
    return given | {"output_dir": str(folder)}


def is_finished(folder: Path) -> bool:
    return json.loads((folder / "run.json").read_text(encoding="utf-8")).get("finished", False)


def read_run(folder: Path, names: set[str]) -> tuple[dict, str]:
    """(the settings in a run's run.json, which are those of these names; the --dtype that the run was computed in)"""
    formats = {str(dtype): name for name, dtype in DTYPES.items()}
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        settings, began_in = run["settings"], formats[run["dtype"]]
    except FileNotFoundError:
        raise RunError(f"nothing to resume: {folder} holds no run (--output_dir names its folder)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder / 'run.json'} is not what train.py writes: {error}") from None
    if differ := settings.keys() ^ names - {"resume", "overwrite"}:
        raise RunError(f"{folder} was begun by another version of train.py, which differs in {', '.join(sorted(differ))}")
    return with_tuples(settings), began_in
