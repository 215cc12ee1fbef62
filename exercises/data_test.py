"""Exercises in data.py. Each test is red until you have changed what it names; its docstring says what, and why one would."""

import data

DIALOG = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where does Mira live?"},
    {"role": "assistant", "content": "In Oakford."},
    {"role": "user", "content": "And works?"},
    {"role": "assistant", "content": "There, too."},
]


def test_template():
    """A template of your own. Add "chatml" to TEMPLATES: each message stands between <|im_start|>, its role, a line's end, and
    <|im_end|>, a line's end. A fine-tuned model has to be asked as it was taught, so this is all that a format is."""
    written = "".join(piece.text for piece in data.write_dialog(DIALOG, data.TEMPLATES["chatml"]))
    assert written == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhere does Mira live?<|im_end|>\n<|im_start|>assistant\nIn Oakford.<|im_end|>\n"
        "<|im_start|>user\nAnd works?<|im_end|>\n<|im_start|>assistant\nThere, too.<|im_end|>\n"
    )
    replies = [piece.text for piece in data.write_dialog(DIALOG, data.TEMPLATES["chatml"]) if piece.reply]
    assert replies == ["In Oakford.<|im_end|>\n", "There, too.<|im_end|>\n"]  # only these are learned


def test_best_fit():
    """Fuller rows. `pack` puts a document into the first row with room for it. Change it to the row with the *least* room that is
    enough ("best fit"): here two full rows come of it instead of three. Every document must still be in just one row."""
    rows = [sorted(row) for row in data.pack([5, 7, 3, 5], 10, range(4))]
    assert sorted(rows) == [[0, 3], [1, 2]]
    sizes = [(i * 37) % 90 + 5 for i in range(200)]
    rows = data.pack(sizes, 100, range(200))
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert all(sum(sizes[i] for i in row) <= 100 for row in rows)
