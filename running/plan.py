"""The steps of a run. What a step learns from follows from its number, whoever computes it: that makes resuming exact, and
several processes equal to one."""

import math
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from data import PackedBatches
from running.settings import RunError
from running.workers import NotFinite, Workers


@dataclass(frozen=True)
class Plan:
    """The steps, counted from 1, and what they have in common."""

    rows_per_step: int  # of all processes together: their number may be another when the run is resumed
    steps_per_epoch: int
    total: int
    peak: float  # of the learning rate
    dtype: torch.dtype  # of the computation

    def rows(self, step: int, rank: int, world: int) -> tuple[int, range]:
        """(epoch, which of its rows this rank has in the step)"""
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        return epoch, range(index * self.rows_per_step + rank, (index + 1) * self.rows_per_step, world)

    def explain(self, error: NotFinite, step: int, batches: PackedBatches, world: int) -> RunError:
        """The same error, with the step and the documents in which it came up."""
        where = ""
        for rank in error.ranks:
            epoch, rows = self.rows(step, rank, world)
            documents = ", ".join(str(i + 1) for row in rows for i in batches.documents_in(epoch, row))
            where += f" on rank {rank} (documents {documents} of those kept)"
        advice = "Try a lower --learning_rate, or --dtype bf16 instead of fp16"
        return RunError(f"{error} in step {step}{where}; the last checkpoint stands. {advice}")


def fingerprint(batches: PackedBatches) -> int:
    """Of the documents' lengths, which decide what is learnt in which step."""
    return zlib.crc32(np.asarray(batches.sizes, np.int64))


def beginning(config, batches: PackedBatches, world: int) -> dict:
    """What a run's steps leave behind, beside weights and optimizer, before there has been one."""
    rows_per_step = config.gradient_accumulation_steps * world
    return {"step": 0, "best": math.inf, "rows": [], "rows_per_step": rows_per_step, "lengths": fingerprint(batches)}


def make_plan(config, batches: PackedBatches, state: dict, peak: float, dtype: torch.dtype, workers: Workers) -> Plan:
    rows_per_step, lengths = state["rows_per_step"], fingerprint(batches)
    if state.get("lengths", lengths) != lengths:
        raise RunError(
            f"the run in {config.output_dir} began on other records than {', '.join(config.data)} gives now, or wrote them out "
            "by another template or tokenizer: resume it with those, or begin anew with --overwrite"
        )
    if rows_per_step % workers.world:
        raise RunError(
            f"a step of the run in {config.output_dir} has {rows_per_step} rows, which {workers.world} processes cannot share"
        )
    if config.optimizer_in_backward and rows_per_step > workers.world:  # begun on more: it would step once for each row
        raise RunError(
            f"a step of the run in {config.output_dir} has {rows_per_step} rows, and --optimizer_in_backward never has the "
            f"gradient of more than one a process: resume it on {rows_per_step} processes"
        )
    steps_per_epoch = math.ceil(len(batches) / rows_per_step)
    total = config.max_steps or math.ceil(config.num_train_epochs * steps_per_epoch)
    return Plan(rows_per_step, steps_per_epoch, total, peak, dtype)
