"""A chat page in the browser, made with gradio: several people at once, every voice in a column of its own.

The page talks to this machine alone: gradio's statistics, its public links, its upload and its history are off, and the text of a
model is shown as it is, never as HTML or Markdown that could fetch a picture from elsewhere."""

import os
import queue
import sys
import threading
import time
from collections import deque
from contextlib import closing
from functools import partial

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: gradio reads it there

import torch

from data import DataError
from generate import GenerateConfig, Sampling
from talking.chat import Reply, check_text
from talking.voices import Voice

try:
    import gradio as gr
except ImportError:
    raise DataError("--web needs gradio: pip install gradio") from None

TOGETHER = 8  # so many questions are answered at once,
WAITING = 32  # so many more may wait, and whoever comes then is told that the queue is full
SETTINGS = {  # of Sampling: the least and the most on the slider, the step, what it does
    "max_new_tokens": (1, 1024, 1, "the answer is cut here"),
    "temperature": (0, 2, 0.05, "0: always the likeliest token"),
    "top_k": (0, 200, 1, "among the k likeliest; 0: all"),
    "top_p": (0.01, 1, 0.01, "among the likeliest that together have this probability"),
    "min_p": (0, 1, 0.01, "among those this many times as likely as the likeliest"),
    "repetition_penalty": (0.5, 2, 0.05, "above 1: what was there becomes less likely"),
    "seed": (0, 2**31 - 1, 1, "the same seed, the same answer"),
}


class Desk:
    """The one thread that works the models: of all answers under way it makes a token of each in turn.

    So nobody waits for the end of another's answer, and no two threads are ever inside a model. Each answer has its own cache and
    its own random numbers, which is why it is the same as if it had been alone."""

    def __init__(self):
        self.arrivals: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def take(self, stream):
        """Yield what a generator yields, and raise what it raises, made in the desk's thread. Closing this ends that."""
        made, left = queue.SimpleQueue(), threading.Event()
        self.arrivals.put((stream, made, left))
        try:
            while (item := made.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            left.set()

    @torch.inference_mode()
    def _work(self):
        under_way: deque = deque()
        while True:
            while not under_way or not self.arrivals.empty():
                under_way.append(self.arrivals.get())
            stream, made, left = under_way.popleft()
            if left.is_set():
                stream.close()
                continue
            try:
                made.put(next(stream))
                under_way.append((stream, made, left))
            except StopIteration:
                made.put(None)
            except Exception as error:  # the asker's, and not the end of the desk
                made.put(error)


def answer(desk: Desk, voices: list[Voice], turns: list, question: str, system: str, sampling: Sampling, tries: int):
    """Ask every voice at once; yield (turns, a line of counts for each voice) as the answers grow, at most 20 times a second."""
    window = voices[0].model.config.max_seq_len
    if len(question) + len(system) > 16 * window:  # no piece of a SentencePiece vocabulary has more characters
        raise DataError(f"{len(question) + len(system):,} characters do not fit the window of {window} tokens")
    check_text(question + system, "the message")
    replies = [Reply(voice, system, turns, question, who, sampling, desk.take) for who, voice in enumerate(voices)]
    under_way, shown = [iter(reply) for reply in replies], time.monotonic()
    while under_way:
        under_way = [pieces for pieces in under_way if next(pieces, None) is not None]
        if not under_way or time.monotonic() - shown > 0.05:
            shown = time.monotonic()
            yield [*turns, (question, [reply.text for reply in replies], tries)], [str(reply) for reply in replies]


def page(voices: list[Voice], config: GenerateConfig) -> gr.Blocks:
    """The page. What was said is kept on the server for each open page; the browser is only shown it."""
    desk, stopped = Desk(), {}  # by open page: an event, set when its answer is to stop

    def shown(turns, counts=(), busy=False, box=""):
        """The values of `outputs` below."""
        chats = []
        for who in range(len(voices)):
            chats.append([])
            for question, replies, _ in turns:
                reply = replies[who] or ("…" if busy else "(nothing)")
                chats[-1] += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        free = [gr.update(interactive=not busy)] * 4
        return [turns, box, gr.update(interactive=busy), *free, *chats, *(counts or [""] * len(voices))]

    def ask(request: gr.Request, turns, question, system, *settings, again=False):
        """again: the last question, with another seed. What is refused changes nothing of what was said."""
        earlier, box, tries = turns, question, 0
        if again:
            *turns, (question, _, tries) = turns
            tries += 1
        kinds = {name: type(getattr(config, name)) for name in SETTINGS}
        stop = stopped[request.session_hash] = threading.Event()
        try:
            question, system = question or "", system or ""  # the page sends texts, others may send nothing
            if not question.strip():
                raise DataError("there is nothing to answer")
            for name, value in zip(SETTINGS, settings, strict=True):
                if value is None:
                    raise DataError(f"{name} is empty, and needs a number")
            given = {name: kinds[name](value) for name, value in zip(SETTINGS, settings, strict=True)}
            sampling = Sampling(**given | {"seed": given["seed"] + tries, "stop": config.stop})
            yield shown([*turns, (question, [""] * len(voices), tries)], busy=True)
            with closing(answer(desk, voices, turns, question, system, sampling, tries)) as growing:
                for turns_now, counts in growing:
                    if stop.is_set():  # what was said until then stays
                        break
                    yield shown(turns_now, counts, busy=True)
            yield shown(turns_now, counts)
        except (ArithmeticError, DataError, RuntimeError, TypeError, ValueError) as error:  # RuntimeError: no memory, say
            gr.Warning(str(error))
            yield shown(earlier, box=(box or "").encode(errors="replace").decode())  # half a character cannot be sent back
        finally:
            stopped.pop(request.session_hash, None)

    def stop_answer(request: gr.Request):
        if request.session_hash in stopped:
            stopped[request.session_hash].set()

    def regenerate(request: gr.Request, turns, box, *settings):
        yield from ask(request, turns, box, *settings, again=True) if turns else [shown(turns)]

    with gr.Blocks(title="nanotune", analytics_enabled=False) as blocks:
        turns = gr.State([])
        with gr.Row():
            columns = []
            for voice in voices:
                with gr.Column():
                    plain = {"render_markdown": False, "buttons": ["copy"], "feedback_options": None}
                    chat = gr.Chatbot(label=voice.name, height="55vh", elem_classes="chat", **plain)
                    columns.append((chat, gr.Markdown(elem_classes="counts")))
        longest = 16 * voices[0].model.config.max_seq_len
        box = gr.Textbox(placeholder="Ask something", show_label=False, autofocus=True, max_lines=6, max_length=longest)
        with gr.Row():
            send = gr.Button("Send", variant="primary")
            stop = gr.Button("Stop", variant="stop", interactive=False)
            again, undo, clear = gr.Button("Regenerate"), gr.Button("Undo"), gr.Button("Clear")
        with gr.Accordion("How tokens are chosen", open=False):
            system = gr.Textbox(config.system or "", label="system message", max_length=longest)
            settings = []
            with gr.Row():
                for name, (least, most, step, info) in SETTINGS.items():
                    now = getattr(config, name)
                    if name == "seed":
                        settings.append(gr.Number(now, label=name, info=info, precision=0))
                    else:
                        settings.append(gr.Slider(min(least, now), max(most, now), now, step=step, label=name, info=info))
        chats, counts = zip(*columns, strict=True)
        outputs = [turns, box, stop, send, again, undo, clear, *chats, *counts]
        inputs = [turns, box, system, *settings]
        model = {"concurrency_limit": TOGETHER, "concurrency_id": "model", "show_progress": "hidden"}
        gr.on([box.submit, send.click], ask, inputs, outputs, api_visibility="undocumented", **model)
        again.click(regenerate, inputs, outputs, api_visibility="undocumented", **model)
        quick = {"api_visibility": "private", "show_progress": "hidden"}
        stop.click(stop_answer, None, None, **quick)
        undo.click(lambda turns: shown(turns[:-1], box=turns[-1][0] if turns else ""), turns, outputs, **quick)
        gr.on([clear.click, *(chat.clear for chat in chats)], partial(shown, []), None, outputs, **quick)
    return blocks.queue(max_size=WAITING, api_open=False)


def serve(voices: list[Voice], config: GenerateConfig) -> None:
    """Open the page and stay until Ctrl-C."""
    if not config.host.startswith("127.") and config.host != "::1":
        print(
            f"warning: whoever can reach {config.host}:{config.port} can use this page; it asks for no password", file=sys.stderr
        )
    blocks, host = page(voices, config), f"[{config.host}]" if ":" in config.host else config.host  # IPv6 in an address
    try:
        blocks.launch(
            server_name=host,
            server_port=config.port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
            max_file_size=1,
            css=".counts { min-height: 1.5em; opacity: 0.7 } .message-content .md { white-space: pre-wrap }",
        )
    except OSError:
        raise DataError(f"port {config.port} of {config.host} is taken or not allowed: name another with --port") from None
    print(f"http://{host}:{config.port}  (Ctrl-C ends)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        os._exit(130)  # at once: the desk's thread may be inside a model, and Python's own way to end would abort there
