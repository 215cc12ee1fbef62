"""The exam: held-out questions, asked before and after training, and how many of the answers are right word for word.

Many are answered at a time, which changes no answer (generate.py) and reads every weight once for all of them. In shards that is
most of the time: a block is gathered from all processes for every token that is made with it."""

from pathlib import Path

from data import DataError, encode_dialog
from generate import Sampling, answers
from model import Llama
from running.checkpoint import write_text
from running.reading import Data
from running.workers import Workers, asking

TOGETHER = 32  # questions at most


class Exam:
    """Held-out prompts, asked before and after training: the few that samples.md shows, or with exact_match all."""

    def __init__(self, config, data: Data, model: Llama, workers: Workers):
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

    def prompt(self, dialog: list[dict]) -> list[int]:
        return encode_dialog(dialog[:-1], self.data.tokenizer, self.data.template)[0]

    def fits(self, dialog: list[dict]) -> bool:
        """Whether there is a prompt, a reply to compare with, and room for one in the model's window."""
        return dialog[-1]["role"] == "assistant" and len(self.prompt(dialog)) + 128 <= self.model.config.max_seq_len

    def groups(self, dialogs: list[list[dict]]):
        """Yield lists of (prompt, most tokens of its reply) to answer together, whose cache is no longer than a row of training.
        Where replies are counted, a little longer than the reference is enough."""
        group, longest = [], 0
        for dialog in dialogs:
            prompt = self.prompt(dialog)
            limit = len(self.data.tokenizer.encode(dialog[-1]["content"])) + 8 if self.all else 128
            longest = max(longest, len(prompt) + limit)
            if group and (len(group) == TOGETHER or (len(group) + 1) * longest > self.data.batches.row_tokens):
                yield group
                group, longest = [], len(prompt) + limit
            group.append((prompt, limit))
        if group:
            yield group

    def ask(self) -> list[str]:
        """Greedy replies, shared out over the ranks."""
        voice, replies = (self.model, self.data.tokenizer, self.data.template), []
        with asking(self.model):
            for group in self.groups(self.asked if self.together else self.asked[self.workers.rank :: self.workers.world]):
                prompts, limits = map(list, zip(*group, strict=True))
                said = answers(*voice, prompts, Sampling(max_new_tokens=max(limits)), limits=limits)
                replies += [text for text, _ in said]
        return replies if self.together else self.workers.gather(replies)

    def report(self, folder: Path, before: list[str], after: list[str]):
        """Write samples.md. Yield, where all is asked, a row for the log of each file: how much was answered word for word."""
        if self.shown and self.workers.first:
            write_text(folder / "samples.md", self.samples(folder, before, after))
            self.workers.say(f"prompts and replies before and after: {folder / 'samples.md'}")
        marks = [[reply == d[-1]["content"].strip() for reply, d in zip(rs, self.asked, strict=True)] for rs in (before, after)]
        for name in dict.fromkeys(self.files if self.all else ()):
            places = [i for i, file in enumerate(self.files) if file == name]
            old, new = (sum(right[i] for i in places) / len(places) for right in marks)
            self.workers.say(f"{name}: {old:.1%} of {len(places)} answered exactly before, {new:.1%} after")
            yield {"eval_data": name, "exact_match_before": old, "exact_match_after": new}

    def samples(self, folder: Path, before: list[str], after: list[str]) -> str:
        lines = [
            "# Before and after",
            "",
            f"Held-out prompts, answered greedily before and after the training in `{folder.name}`. A reply is cut "
            + ("8 tokens behind the reference's length." if self.all else "after 128 tokens."),
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
        return "\n".join(lines)
