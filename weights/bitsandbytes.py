"""The file layout of bitsandbytes for a linear in NF4: transformers opens what is written so, and what it writes is read here.

    o_proj.weight                                   uint8 (n/2, 1): two codes a byte
    o_proj.weight.absmax                            uint8 (n/64,): of every block of 64 its scale, itself in 8 bits
    o_proj.weight.nested_absmax                     fp32 (n/64/256,): the scale of 256 such scales
    o_proj.weight.quant_map, .nested_quant_map      the levels that the codes and the 8 bits stand for
    o_proj.weight.quant_state.bitsandbytes__nf4     all but tensors, as JSON in bytes: shape, block sizes, the mean of the scales

The codes are those of quant.py, so nothing is rounded on the way. What takes care is the order of rows: query and key rows stand
elsewhere in Hugging Face's files (names.py, to_hf), and 256 scales under one nested scale are several rows, which may part.
"""

import json
import math

import torch

from quant import BLOCK, DYNAMIC_CODE, NESTED_BLOCK, NF4_CODE, PackedNF4, QuantError

_STATE = "quant_state.bitsandbytes__nf4"


def from_bitsandbytes(parts: dict[str, torch.Tensor], shape, rows: torch.Tensor | None, device) -> PackedNF4:
    """A weight on `device` from what bitsandbytes writes for it: {"weight": ..., "absmax": ..., "quant_map": ..., ...}.

    rows: the order that its rows are to have here, if another. Exact to the bit either way (see `reordered`).
    Raises QuantError for a missing part, another format than NF4, other block sizes."""
    kind = next((name for name in parts if name.startswith("quant_state.")), None)
    if kind is None:
        raise QuantError(f"is packed, but its {_STATE} is missing")
    if kind != _STATE:
        raise QuantError(f"is packed as {kind.rpartition('__')[2]}, and only nf4 is read")
    try:
        state = json.loads(bytes(parts[_STATE].tolist()))
        found = (state["blocksize"], tuple(state["shape"]), state.get("nested_blocksize", NESTED_BLOCK))
        double, offset = "nested_offset" in state, float(state.get("nested_offset", 0))
    except (ValueError, KeyError, TypeError) as error:
        raise QuantError(f"has a {_STATE} that cannot be read: {error}") from None
    if found != (BLOCK, tuple(shape), NESTED_BLOCK):
        raise QuantError(
            f"is packed in blocks of {found[0]} with shape {found[1]} and nested blocks of {found[2]}; "
            f"expected {BLOCK}, {tuple(shape)} and {NESTED_BLOCK}"
        )
    n = math.prod(shape)
    blocks = -(-n // BLOCK)
    expected = {"weight": -(-n // 2), "absmax": blocks, "quant_map": 16}
    if double:
        expected |= {"nested_absmax": -(-blocks // NESTED_BLOCK), "nested_quant_map": 256}
    for name, numel in expected.items():
        if name not in parts:
            raise QuantError(f"is packed, but its {name} is missing")
        if parts[name].numel() != numel:
            raise QuantError(f"is packed, but its {name} has {parts[name].numel()} numbers, expected {numel}")
    for name, code in (("quant_map", NF4_CODE), ("nested_quant_map", DYNAMIC_CODE))[: 1 + double]:
        if not torch.equal(parts[name].float(), code):
            raise QuantError(f"has a {name} with other levels than {'NF4' if name == 'quant_map' else 'the dynamic map'}")
    if parts["weight"].dtype != torch.uint8 or parts["absmax"].dtype != (torch.uint8 if double else torch.float32):
        raise QuantError(f"is packed as {parts['weight'].dtype} with absmax as {parts['absmax'].dtype}")
    # copies: what was read is a view of the file
    data, absmax = (parts[name].flatten().to(device, copy=True) for name in ("weight", "absmax"))
    if double:
        nested = parts["nested_absmax"].float().to(device)
    else:  # fp32 absmax are nested scales of their own, each of one absmax that is the level 1.0
        nested, absmax = absmax, torch.full_like(absmax, 255, dtype=torch.uint8)
    packed = PackedNF4(data, absmax, nested, torch.tensor(offset, device=device), tuple(shape))
    if not packed.scales().isfinite().all():
        raise QuantError("has scales that are NaN or infinity")
    return packed if rows is None else reordered(packed, rows)


def to_bitsandbytes(packed: PackedNF4, rows: torch.Tensor | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The inverse of from_bitsandbytes, on the CPU. dtype: what bitsandbytes is to make of the weight.

    Where the rows change places, 256 absmax that come to stand together may have had different nested scales, and
    bitsandbytes knows one a group. They are then written in fp32, exact again, for 4.5 bits a weight instead of 4.127."""
    packed = PackedNF4(*(part.cpu() for part in packed[:4]), packed.shape)
    if rows is not None:
        packed = reordered(packed, rows)
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": str(dtype)[6:], "shape": packed.shape}
    parts = {"weight": packed.data.view(-1, 1), "absmax": packed.absmax, "quant_map": NF4_CODE.clone()}
    group = NESTED_BLOCK // packed.nested_block
    first = packed.nested[::group]
    if torch.equal(first.repeat_interleave(group)[: len(packed.nested)], packed.nested):
        parts |= {"nested_absmax": first.clone(), "nested_quant_map": DYNAMIC_CODE.clone()}
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": packed.offset.item()}
    else:
        parts["absmax"] = packed.scales()
    return parts | {_STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


def reordered(packed: PackedNF4, rows: torch.Tensor) -> PackedNF4:
    """The same weight, exactly, with row rows[i] as row i. A row must be whole blocks of 64.

    Codes and absmax move with their rows. 256 absmax under one nested scale are several rows, which may part: `nested` is
    then repeated as often as the largest blocks need that never span two rows."""
    (out, columns), blocks, nested = packed.shape, packed.absmax.numel(), packed.nested
    if columns % BLOCK:
        raise QuantError(f"has rows of {columns} numbers, not whole blocks of {BLOCK}: they cannot be put in another order")
    if nested is not None:
        finer = math.gcd(packed.nested_block, columns // BLOCK)
        nested = nested.repeat_interleave(packed.nested_block // finer)[: blocks // finer].view(out, -1)[rows].flatten()
    data, absmax = (part.view(out, -1)[rows].flatten() for part in (packed.data, packed.absmax))
    return PackedNF4(data, absmax, nested, packed.offset, packed.shape)


def rows_after(convert, name: str, count: int, config) -> torch.Tensor | None:
    """Which of a weight's rows stands where after `convert` (names.py's from_hf or to_hf), or None if all stay."""
    before = torch.arange(count)
    after = convert(name, before[:, None], config)[1].flatten()
    return None if torch.equal(before, after) else after
