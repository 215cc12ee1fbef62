"""An exercise in quant.py. Its test is red until you have written what it names; the docstring says what, and why one would."""

import torch

import quant


def test_even_levels():
    """Why NF4 and not sixteen levels at equal distances? Write `even_levels()`: fp32, from -1 to 1. The test packs normal data
    with both; before you run it, guess how much larger the mean squared error becomes. (It prints it: `-rP`.)"""
    torch.manual_seed(0)
    x = torch.randn(2**16)
    levels = quant.even_levels()
    assert levels.shape == (16,) and levels.dtype == torch.float32 and (levels[0], levels[-1]) == (-1, 1)
    assert (levels.diff() - 2 / 15).abs().max() < 1e-6
    errors = []
    for code in (quant.NF4_CODE, levels):
        packed = quant.quantize_blockwise(x, code, 64)
        errors.append((quant.dequantize_blockwise(*packed, code, 64) - x).square().mean().item())
    print(f"mean squared error: NF4 {errors[0]:.5f}, even levels {errors[1]:.5f}, {errors[1] / errors[0]:.2f} times as much")
    assert errors[1] > 1.1 * errors[0]
