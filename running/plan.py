"""The steps of a run. What a step learns from follows from its number, whoever computes it: that makes resuming exact, and
several processes equal to one."""

import math
import zlib
from dataclasses import dataclass
from itertools import chain

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


def fingerprint(*all_batches: PackedBatches) -> int:
    """Of documents: where each ends, every token, and which of them train."""
    total = 0
    for batches in all_batches:
        documents = batches.documents  # in memory, or a mapped file, where one array holds what each document has in two
        tokens = [documents.tokens] if hasattr(documents, "tokens") else chain.from_iterable(documents)
        for part in (np.asarray(batches.sizes, np.int64), *tokens):
            total = zlib.crc32(part, total)
    return total


def beginning(config, data, world: int) -> dict:
    """What a run's steps leave behind, beside weights and optimizer, before there has been one."""
    rows_per_step, records = config.gradient_accumulation_steps * world, fingerprint(data.batches, *data.evaluations.values())
    return {"step": 0, "best": math.inf, "rows": [], "rows_per_step": rows_per_step, "records": records}


def make_plan(
    config, batches: PackedBatches, state: dict, fresh: dict, peak: float, dtype: torch.dtype, workers: Workers
) -> Plan:
    """fresh: `state` as it would be before the first step of a run begun now."""
    rows_per_step = state["rows_per_step"]
    if state.get("records", fresh["records"]) != fresh["records"]:
        raise RunError(
            f"the run in {config.output_dir} began on other records than {', '.join((*config.data, *config.eval_data))} gives "
            "now, or wrote them out by another template or tokenizer: resume it with those, or begin anew with --overwrite"
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
