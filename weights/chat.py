"""A template of data.py as others ask for it: a chat template, the Jinja by which transformers, vLLM and llama.cpp write a dialog
out. It stands in tokenizer_config.json, and gives the tokens that training had."""

import json
from functools import partial
from pathlib import Path
from string import Formatter

from data import Template


def chat_template(template: Template) -> str:
    """Jinja that writes messages of the roles system, user and assistant as `write_dialog` does."""

    quoted = partial(json.dumps, ensure_ascii=False)  # a string of JSON is one of Jinja

    def written(text: str, **fields: str) -> str:
        """A format string of data.py as a sum of Jinja's strings and expressions."""
        parts = []
        for literal, field, *_ in Formatter().parse(text):
            parts += [quoted(literal)] if literal else []
            parts += [fields[field]] if field is not None else []
        return " ~ ".join(parts) or '""'

    content = "message.content | trim"
    system = f"(({written(template.system, system='system')}) if system else '')"
    user = written(template.user, system=system, user=f"({content})", input="''")
    begins = "bos_token" if template.bos_every_turn else "(bos_token if loop.first else '')"
    # A reply is tokenised by itself, with SentencePiece's leading space: written out here, where all is tokenised at once.
    reply = f"' ' ~ {written(template.assistant, assistant=f'({content})')} ~ eos_token"
    return (
        "{% set told = messages[0].role == 'system' %}"
        "{% for message in (messages[1:] if told else messages) %}"
        f"{{% if message.role == 'assistant' %}}{{{{ {reply} }}}}"
        f"{{% else %}}{{% set system = ((messages[0].content | trim if told else '') or {quoted(template.default_system)})"
        " if loop.first else '' %}"
        f"{{{{ {begins} ~ {user} }}}}{{% endif %}}{{% endfor %}}"
    )


def write_chat_template(folder, template: Template) -> None:
    """Put it into the tokenizer_config.json there: asked otherwise than trained, a model babbles."""
    path = Path(folder) / "tokenizer_config.json"
    about = json.loads(path.read_text(encoding="utf-8")) | {"chat_template": chat_template(template)}
    path.write_text(json.dumps(about, indent=2), encoding="utf-8")
