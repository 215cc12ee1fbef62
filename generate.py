"""Generation: one token at a time, each chosen from what the model predicts after all the tokens before it.

    prompt --one pass--> keys and values in the cache, logits of the next token
    next token --one pass of one token--> logits of the one after, until the end token

Without the cache token n would cost n passes' worth of work; with it each costs one. At batch 1 a pass reads every weight
once and does two FLOPs with it, so decoding runs at the speed of memory: 13.5 GB for 7B in 16 bits.

    python generate.py --adapter runs/lora                                   a chat in the terminal; with --web in the browser
    python generate.py --adapter runs/lora --prompt "Which animal does Pena Marmond keep?"
    python generate.py --adapter runs/lora --merge merged          a plain Hugging Face model, adapter included
    python generate.py --model llama-2-7b --quantize nf4 --save nf4          the same model in 4 bits, in bitsandbytes' layout

The folder of a run knows its base model, tokenizer and prompt template: what was trained with is what is asked with
(talking/voices.py). In talking/ stand the chat, the page in the browser, files of prompts, and the latency report, too.
"""

import os
import random
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError

from data import DataError, Template, Tokenizer
from helping.flags import parse_flags, with_tuples
from lora import LoRAError
from model import CheckpointError, KVCache, Llama

TINY = Path(__file__).resolve().parent / "tiny"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Sampling:
    # How tokens are chosen
    max_new_tokens: int = 256  # the answer is cut here, after some 200 words, if no end token came
    temperature: float = 0.0  # 0: always the likeliest token, the same each time; 1: as the model predicts; above: wilder
    top_k: int = 0  # choose among the k likeliest tokens only; 0: among all
    top_p: float = 1.0  # choose among the likeliest tokens that together have this probability; 1: all, 0.9 is usual
    min_p: float = 0.0  # choose among tokens at least this many times as likely as the likeliest; 0: all, 0.05 is usual
    repetition_penalty: float = 1.0  # above 1: tokens that have been there already become less likely; its authors took 1.2
    seed: int = 0  # the same seed gives the same answer
    stop: tuple[str, ...] = ()  # the answer ends before the first of these texts, as well as those of the template

    def __post_init__(self):
        for name, ok, need in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("stop", all(self.stop), "texts that are not empty"),
        ):
            if not ok:
                raise DataError(f"--{name} must be {need}, not {getattr(self, name)}")
        if self.temperature == 0 and (self.top_k or self.top_p < 1 or self.min_p):
            raise DataError(
                "--top_k, --top_p and --min_p choose among likely tokens, --temperature 0 always takes the likeliest: raise it"
            )

    def numbers(self) -> tuple[float, ...]:
        """Penalty, temperature, top-p and min-p, within what fp32 tells from 0 and infinity."""
        return min(max(self.repetition_penalty, 1e-30), 1e30), max(self.temperature, 1e-30), self.top_p, self.min_p

    def at_work(self) -> "Sampling":
        """What a step is compiled for: which of the numbers do anything. Their values it is told when it runs."""
        return replace(
            self,
            repetition_penalty=1.0 if self.repetition_penalty == 1 else 2.0,
            temperature=1.0 if self.temperature else 0.0,
            top_p=1.0 if self.top_p == 1 else 0.5,
            min_p=0.5 if self.min_p else 0.0,
        )


@dataclass(frozen=True)
class GenerateConfig(Sampling):
    # What answers
    model: str | None = None  # folder with weights, Meta's or Hugging Face's; a run's own base, or tiny/, if not given
    adapter: tuple[str, ...] = ()  # folder of a LoRA run, or of any PEFT adapter; of several the base and each answer
    compare: bool = False  # the base answers too, beside its adapter
    tokenizer: str | None = None  # SentencePiece file; tokenizer.model of the run or the model if not given
    template: str | None = None  # how the prompt is written out: a name or a JSON file; the run's own if not given
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the weights; auto: bf16 on a GPU, for a large model on a CPU
    quantize: Literal["none", "int8", "nf4"] | None = None  # weights of the blocks in 8 or 4 bits; as the run was if not given
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA if there, else CPU
    compile: bool = False  # the step of decoding by torch.compile: a minute at the first answer, faster after; on CUDA as a graph
    # What is asked; nothing given: a chat in the terminal
    prompt: str | None = None  # the user's message
    system: str | None = None  # a system message before it
    prompts: str | None = None  # a file of them: a line {"prompt": "..."}, or a record that could train, less its last reply
    out: str | None = None  # the JSONL file for the answers to --prompts, which goes on where it ends; or for --latency's figures
    batch_size: int = 8  # so many prompts of a file, or samples, are answered together: more are faster, while memory lasts
    samples: int = 1  # answers to each prompt, with other random numbers each
    web: bool = False  # a chat in the browser
    port: int = 7860  # of the page
    host: str = "127.0.0.1"  # who can open the page: this machine alone; 0.0.0.0: whoever can reach it
    latency: bool = False  # instead of answering: 100 runs of 50 tokens, as a table and in latency.jsonl of the run's folder
    merge: str | None = None  # instead of answering: save model and adapter as one, here, for Hugging Face
    save: str | None = None  # instead of answering: save the model as it was loaded, here; nf4 in bitsandbytes' 4-bit layout


def pick_device(name: str) -> torch.device:
    """auto: CUDA if there, else CPU. Under torchrun each process takes the GPU of its local rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda: this machine has no CUDA device that PyTorch can use")
    if name == "mps" and not torch.backends.mps.is_available():
        raise DataError("--device mps: this machine has no Apple GPU that PyTorch can use")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: on CUDA bf16, or fp16 where the GPU has no bf16 (T4, V100); elsewhere fp32."""
    if name != "auto":
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def sample(logits: torch.Tensor, sampling: Sampling, draws: torch.Tensor, seen=None, numbers=None) -> torch.Tensor:
    """Choose a token for each row of logits (B, V), by a number of draws (B,) in (0, 1] for each. Returns int64 (B,),
    -1 where there is none to choose, as the logits are NaN.

    seen (B, V), true for the tokens that have been there: their logits are divided by the repetition penalty, or times it
    where they are negative ("CTRL", section 4.1, divides all). Then come temperature, top-k, top-p ("The Curious Case of Neural
    Text Degeneration", section 3.1) and min-p ("Turning Up the Heat", section 3), in transformers' order.
    numbers (4,): the values of these where `sampling` only says which are at work."""
    logits = logits.float()
    by, temperature, top_p, min_p = sampling.numbers() if numbers is None else numbers
    if sampling.repetition_penalty != 1:
        logits = torch.where(seen, torch.where(logits > 0, logits / by, logits * by), logits)
    if sampling.temperature == 0:
        return logits.argmax(-1).masked_fill(logits.amax(-1).isnan(), -1)
    logits, ids = logits / temperature, None
    if sampling.top_k or sampling.top_p < 1:
        logits, ids = logits.topk(min(sampling.top_k or logits.shape[-1], logits.shape[-1]))  # the likeliest first
    probs = logits.softmax(-1)
    if sampling.top_p < 1:  # a token stays while those likelier than it sum to less than top_p: the smallest set that reaches it
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)
    if sampling.min_p:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0)
    # Laid end to end the probabilities make a line; the token is the one on whose stretch the draw falls.
    line = probs.cumsum(-1)
    chosen = torch.searchsorted(line, draws[:, None] * line[:, -1:]).clamp(max=line.shape[-1] - 1)
    return (chosen if ids is None else ids.gather(-1, chosen))[:, 0].masked_fill(line[:, -1].isnan(), -1)


def next_tokens(model: Llama, cache: KVCache, tokens, borders, sampling: Sampling, draws, seen, numbers) -> torch.Tensor:
    """One step: read the tokens of the stream, choose the next of each of its B documents (B,). Nothing changes but the cache:
    a CUDA graph is not made of a step that writes into a tensor whose address it does not know."""
    return sample(model(tokens, borders, cache=cache), sampling, draws, seen, numbers)


def compile_decoding(model: Llama) -> Llama:
    """From now on generate_batch's steps for this model are compiled, on CUDA into one graph of kernels that is launched at once.

    A step's Python, and the launch of each of its some 15 kernels a block, then cost nothing. Shapes must not change: all of the
    cache is looked at, and a sequence that has ended stays, unheard. The first step of a new shape takes a minute."""
    mode = "reduce-overhead" if model.device.type == "cuda" else "default"
    model.compiled_step = torch.compile(next_tokens, mode=mode, dynamic=False)
    return model


@contextmanager
def _cache(model: Llama, prompts: list[list[int]], room: int, keep: bool):
    """(a cache, a list of the ids it has read): none yet, or with `keep` what the last answer's has in common with this prompt.
    The caller adds to them. Compiled steps take the last cache too, where it fits: a graph knows its addresses."""
    static = hasattr(model, "compiled_step")
    if static or keep:  # so that answers of other lengths find the same shapes
        room = min(model.config.max_seq_len, max(256, 1 << (room - 1).bit_length()))
    last, ids = model.__dict__.pop("free_cache", (None, []))  # nobody else can have it meanwhile
    # At least two tokens are left to read: one alone would be attended to as in decoding, which rounds differently.
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(ids, prompts[0][:-2], strict=False))
    ids = [token for token, _ in alike] if keep else []
    if last and last.keys.shape[1:4:2] == (len(prompts), room):
        cache = last
    else:
        cache, begun = KVCache(model.config, room, model.device, model.norm.weight.dtype, len(prompts), static), len(ids)
        if begun:
            cache.keys[..., :begun, :], cache.values[..., :begun, :] = last.keys[..., :begun, :], last.values[..., :begun, :]
    try:
        cache.lengths.fill_(len(ids))
        yield cache, ids
    finally:
        if static or keep:
            model.free_cache = cache, ids[: int(cache.lengths[0])] if keep else []


@torch.no_grad()  # not inference_mode: FSDP would keep what it gathers here as tensors that training cannot use
def generate_batch(
    model: Llama, prompts: list[list[int]], sampling: Sampling, *, stop_tokens=(), streams=None, finished=None, keep=False
):
    """Continue several prompts (lists of token ids) together: yield (index of the prompt, token id) as the tokens come.

    A sequence ends before any of stop_tokens, after sampling.max_new_tokens, at the end of the model's window, or when the
    caller puts its index into the set `finished`; there the indices are found of those that ended. What is said in one sequence
    does not depend on the others: its draws come from (seed, stream), where streams (its index, if not given) names one for each.
    keep, with one prompt: its cache is kept for the next, of which then only what is new is read, as in a chat.
    Raises DataError if a prompt is empty, or fills the model's window alone, and where the model predicts no numbers."""
    window, finished = model.config.max_seq_len, set() if finished is None else finished
    for prompt in prompts:
        if not prompt:
            raise DataError("the prompt has no tokens: there is nothing to continue")
        if len(prompt) >= window:
            raise DataError(f"the prompt has {len(prompt)} tokens and the model's window {window}: nothing is left for an answer")
    device, limits = model.device, [min(len(prompt) + sampling.max_new_tokens, window) - len(prompt) for prompt in prompts]
    streams = range(len(prompts)) if streams is None else streams
    random_numbers = [random.Random(f"{sampling.seed} {stream}") for stream in streams]
    draws = torch.tensor([[1 - numbers.random() for _ in range(max(limits))] for numbers in random_numbers], device=device)
    seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)
    for row, prompt in zip(seen, prompts, strict=True):
        row[prompt] = True
    room = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    step, kind = getattr(model, "compiled_step", None), sampling.at_work()
    numbers = torch.tensor(sampling.numbers(), device=device)
    active = list(range(len(prompts)))  # whose sequence each row of the cache is
    with _cache(model, prompts, room, keep) as (cache, ids):
        unread = [prompts[0][len(ids) :], *prompts[1:]]
        tokens = torch.tensor([token for prompt in unread for token in prompt], device=device)
        borders = torch.tensor([0, *accumulate(len(prompt) for prompt in unread)], dtype=torch.int32, device=device)
        ids += unread[0]
        for n in range(max(limits)):
            run = step if cache.static and n else next_tokens
            tokens = run(model, cache, tokens, borders, kind, draws[:, n].contiguous(), seen, numbers)
            tokens = tokens.clone()  # a graph's answer is overwritten when it runs again, perhaps for another chat
            for index, token in zip(active, tokens.tolist(), strict=True):
                if token < 0:
                    raise DataError(
                        "the model predicts NaN: a weight is broken, or numbers ran over, as in fp16 they may (--dtype)"
                    )
                ids.append(token)
                if token in stop_tokens:
                    finished.add(index)
                elif index not in finished:
                    yield index, token
                    if n + 1 == limits[index]:
                        finished.add(index)
            seen.scatter_(1, tokens[:, None], True)
            leaving = [row for row in reversed(range(len(active))) if active[row] in finished]
            if len(leaving) == len(active):
                break
            for row in leaving:
                if cache.static:  # it stays where it is and talks to itself
                    cache.lengths[row] = 0
                    continue
                cache.drop(row)  # the last row takes its place
                active[row] = active[-1]
                active.pop()
                for part in (tokens, draws, seen):
                    part[row] = part[len(active)]
                tokens, draws, seen = (part[: len(active)] for part in (tokens, draws, seen))
            borders = torch.arange(len(active) + 1, dtype=torch.int32, device=device)


def generate(model: Llama, prompt_tokens, sampling: Sampling, *, stop_tokens=(), keep=False):
    """Yield the token ids that continue prompt_tokens (a list of ids); see generate_batch, whose sequence 0 this is."""
    for _, token in generate_batch(model, [list(prompt_tokens)], sampling, stop_tokens=stop_tokens, keep=keep):
        yield token


def text_stream(tokenizer: Tokenizer, tokens, stop: tuple[str, ...] = ()):
    """Yield the text of a stream of tokens, piece by piece, ending before the first of the `stop` strings.

    Text is held back while it may still change: a character whose bytes are not all there, or the beginning of a stop string."""
    ids, shown, text = [], 0, ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        ends = [text.find(s) for s in stop if s in text]
        if ends:
            yield text[shown : min(ends)]
            return
        whole = text.rstrip("\ufffd")  # less an unfinished character, and the longest tail that begins a stop string
        safe = len(whole) - max((n for s in stop for n in range(len(s)) if whole.endswith(s[:n])), default=0)
        if safe > shown:
            yield text[shown:safe]
            shown = safe
    yield text[shown:].rstrip("\ufffd")  # an answer that was cut inside a character ends before it


def answers(
    model: Llama, tokenizer: Tokenizer, template: Template, prompts: list[list[int]], sampling, streams=None, limits=None
) -> list[tuple[str, int]]:
    """The (text, number of tokens) of the reply to each prompt (token ids), made together, each as it would be alone. streams: as
    generate_batch has them; limits: the most tokens of each, up to sampling.max_new_tokens."""
    stop, finished = (*template.stop, *sampling.stop), set()
    said: list[list[int]] = [[] for _ in prompts]
    stop_tokens = (tokenizer.eos_id,)
    for i, token in generate_batch(model, prompts, sampling, stop_tokens=stop_tokens, streams=streams, finished=finished):
        said[i].append(token)
        if (limits and len(said[i]) == limits[i]) or (stop and any(word in tokenizer.decode(said[i]) for word in stop)):
            finished.add(i)
    return [("".join(text_stream(tokenizer, ids, stop)).strip(), len(ids)) for ids in said]


def main():
    from talking.chat import pick  # here, as they import this file
    from talking.voices import load_voices

    if sys.stdout:  # it may be closed
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a character should not end the program
    try:
        config = GenerateConfig(**with_tuples(parse_flags(GenerateConfig, __doc__)))
        do = pick(config)  # before a long read, which what is wrong with the flags should not wait for
        with torch.inference_mode():  # nothing is trained here: each small operation takes a sixth less
            do(load_voices(config), config)
    except BrokenPipeError:
        sys.stderr.close()  # `| head` has seen enough
    except (CheckpointError, DataError, LoRAError, OSError, SafetensorError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    import generate  # the module that talking/ imports, not a second copy of it

    generate.main()
