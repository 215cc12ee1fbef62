"""A deep model from a shallow one: the layers of a Llama are alike, so what happens in one of them need not be run 80 times.

Of a model of any depth five layers are run: the first and the last, which are different (one takes what needs no gradient, one
meets the loss), and three between, of which the middle one has only its likes for neighbours. In memory.py's diary its part is
repeated once for every further layer, and there stands the diary of the deep model: its storages in the order in which
they are born and die, each with the bytes it has. Phases, peak and what an allocator makes of such a sequence all follow.
"""

import re
from collections import Counter
from dataclasses import replace

FEW = 5


def layer_of(name: str) -> int | None:
    """The number of the layer that a phase or a parameter is named after."""
    found = re.search(r"\b\d+\b", name)
    return int(found[0]) if found else None


def deepen(diary: list[tuple], n: int) -> list[tuple]:
    """The diary of n alike layers from that of FEW.

    It is cut into runs of one layer each: that of the phase, or where a phase is no layer's that of the storage. The third's
    runs are repeated, and where its own storages or a neighbour's live and die, so do the repeated layer's or its neighbour's."""
    numbers, births, third, runs, phase = {}, Counter(), Counter(), [(None, [])], None
    for what, block in diary:
        if what == 0:
            layer = phase = layer_of(block[1])
        else:
            layer = block.layer if phase is None else phase
            if what == 1:  # the same storage of each layer has the same number
                numbers[block] = births[block.layer]
                births[block.layer] += 1
                third[block.kind] += block.bytes * (block.layer == 2)
        if layer != runs[-1][0]:
            runs.append((layer, []))
        runs[-1][1].append((what, block))

    deep, made, before, more = [], {}, 0, n - FEW
    buckets = next((block for block in numbers if block.kind == "gradients" and block.born == "load"), None)
    for layer, events in runs:
        turns = [layer if layer is None or layer < 2 else layer + more]
        if layer == 2:
            turns = range(2, n - 2)[:: -1 if before > 2 else 1]
        for turn in turns:
            for what, block in events:
                if what == 0:
                    part, name = block
                    deep.append((0, (part, name if layer is None else f"{name.split()[0]} {turn}")))
                elif block.layer is not None:
                    places = [block.layer + turn - layer]
                    if layer != 2 and abs(block.layer - layer) > 1:  # of all layers at once, as when backward ends
                        places = range(2, n - 2) if block.layer == 2 else [block.layer + more * (block.layer > 2)]
                    for place in places:
                        key = place, numbers[block]
                        made[key] = made.get(key) or replace(block)
                        deep.append((what, made[key]))
                elif turn == turns[0]:
                    deep.append((what, block))
                    if block is buckets:  # DDP's, which it cuts without regard to layers
                        deep.append((1, replace(block, bytes=more * (third["adapters"] or third["weights"]))))
        before = before if layer is None else layer
    return deep
