"""The program `python data.py`: its flags, and its three commands.

`show` and `stats` are in pages.py, what `prepare` does in stages.py."""

import sys
from dataclasses import dataclass
from typing import Literal

from data import Tokenizer
from helping.files import is_picture
from helping.flags import REPOSITORY, parse_flags, with_tuples
from preparing.readers import DataError
from preparing.records import parse_input

STAGES = ("clean", "length", "quality", "against", "dedup", "select", "split", "mix")


@dataclass(frozen=True)
class DataConfig:
    # What is read
    source: str | None = None  # the field or column with the prompt, if it has a name of its own
    target: str | None = None  # the field or column with the reply
    system: str | None = None  # the field or column with a system message
    template: str | None = None  # how a dialog is written out: a name or a JSON file; by the records' fields if not given
    tokenizer: str = str(REPOSITORY / "tiny" / "tokenizer.model")  # SentencePiece file
    model_max_length: int = 512  # longest document in tokens, as in train.py: show and stats mark what is cut, prepare removes it
    seed: int = 42  # draws the order, the split, the copies: the same seed writes the same file
    # show
    n: int = 3  # records shown
    # stats
    plot: str | None = None  # draw the lengths here, over what is there (needs matplotlib)
    # prepare
    out: str | None = None  # the JSONL file to write; with --split also FILE.validation.jsonl
    stages: tuple[str, ...] = STAGES  # those that are on; select, split and against also need their own flag
    min_tokens: int = 0  # length: shorter records go; 0: none
    near: float = 0.95  # dedup, split: share of the words that near-duplicates have in common; at 0.95 one in 40 may differ
    dedup_on: Literal["whole", "reply"] = "whole"  # what is compared: all that is said, or the replies alone
    against: tuple[str, ...] = ()  # files of evaluation records: what shares 13 words in a row with one goes
    select: int = 0  # so many records are kept; 0: all
    select_by: Literal["longest", "diverse"] = "longest"  # which: the longest, or the most unlike each other, by their replies
    split: float = 0.0  # share held out for validation; 0: none
    overwrite: bool = False  # replace the file that --out names

    def __post_init__(self):
        whole = {"model_max_length": 1, "n": 1, "min_tokens": 0, "select": 0, "seed": 0}
        counts = ((name, least, 2**31) for name, least in whole.items())
        for name, least, most in (*counts, ("split", 0, 0.99), ("near", 0.3, 1)):
            if not least <= getattr(self, name) <= most:
                raise DataError(f"--{name} must be from {least} to {most}, not {getattr(self, name)}")
        if self.plot is not None and not is_picture(self.plot):
            raise DataError(f"--plot {self.plot}: name a .png, .pdf or .svg in a folder that is there")
        if unknown := {*self.stages} - {*STAGES}:
            raise DataError(f"unknown stage {', '.join(sorted(unknown))}: known are {', '.join(STAGES)}")


def answer(words: list[str], essay: str) -> None:
    """Do what the command line asks for: a command, its files, then flags. essay: what --help opens with."""
    from preparing.pages import show, stats  # here, as they import this file
    from preparing.stages import prepare

    commands = {"show": show, "stats": stats, "prepare": prepare}
    flags = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    given = parse_flags(DataConfig, essay, words[flags:])
    if flags < 2 or words[0] not in commands:
        raise DataError("say show, stats or prepare, and the files: python data.py show mine.jsonl --template llama2 --n 3")
    config = DataConfig(**with_tuples(given))
    if "tokenizer" not in given:
        print("counted in the tokens of the embedded model; --tokenizer names your model's", file=sys.stderr)
    commands[words[0]](config, [parse_input(word) for word in words[1:flags]], Tokenizer(config.tokenizer))
