"""quant.py: NF4 as published and as bitsandbytes stores it, and linears that give exactly what their packed weight says."""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import load
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import generate as generate_script
import quant
from data import TEMPLATES, PackedBatches, Tokenizer, encode_documents
from generate import GenerateConfig, Sampling, generate
from lora import LoRALinear, add_lora, lora_parameters, merge_lora
from model import CheckpointError, Llama, ModelConfig, load_model, save_hf, save_meta, to_hf
from quant import (
    DYNAMIC_CODE,
    NF4_CODE,
    UNSIGNED_CODE,
    AdamW8bit,
    Int8Linear,
    NF4Linear,
    PackedNF4,
    QuantError,
    adamw_op,
    adamw_plain,
    adamw_triton,
    dequantize_nf4,
    dequantize_op,
    dequantize_plain,
    dequantize_triton,
    linear_plain,
    matvec_triton,
    nearest_level,
    nf4_linear_op,
    quantize_blockwise,
    quantize_nf4,
    stochastic_round,
    triton,
)
from train import RunError, complete, train
from weights.bitsandbytes import reordered

REPOSITORY = Path(__file__).resolve().parent.parent

# QLoRA, appendix E: the levels as their authors printed them.
PUBLISHED = """-1 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
-0.09105003625154495 0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1"""

WEIGHTS = {
    "normal": lambda: torch.randn(512, 256) * 0.02,
    "odd, last block not full": lambda: torch.randn(33, 71),
    "less than a block": lambda: torch.randn(3, 5),
    "zeros": lambda: torch.zeros(2, 64),
    "one element": lambda: torch.tensor([[1.5]]),
    "tiny values": lambda: torch.randn(5, 64) * 1e-7,
    "huge values": lambda: (torch.randn(4, 64) * 3e4).clamp(-6e4, 6e4),
    "one outlier": lambda: torch.randn(8, 64).index_fill(1, torch.tensor(3), 1000.0),
}


def weight_of(kind: str, dtype=torch.float32) -> torch.Tensor:
    torch.manual_seed(0)
    return WEIGHTS[kind]().to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The format


def test_the_derived_levels_are_the_published_ones_to_the_bit():
    assert torch.equal(NF4_CODE, torch.tensor([float(x) for x in PUBLISHED.split()]))


def test_the_dynamic_map_has_256_levels_one_zero_and_its_published_ends():
    for code, lowest in ((DYNAMIC_CODE, -0.9929687), (UNSIGNED_CODE, 0.0)):
        assert len(code.unique()) == 256 and (code == 0).sum() == 1 and code.max() == 1
        assert code.min().item() == pytest.approx(lowest)


def test_the_first_weight_is_in_the_high_half_of_its_byte():
    packed = quantize_nf4(torch.tensor([1.0, -1.0] + [0.0] * 62), double_quant=False)
    assert packed.data[:3].tolist() == [0xF0, 0x77, 0x77] and packed.absmax.tolist() == [1.0]
    assert quantize_nf4(torch.zeros(64), double_quant=False).data.unique().tolist() == [0x77]


@pytest.mark.parametrize("kind", WEIGHTS)
def test_every_weight_goes_to_the_nearest_level_of_its_block(kind):
    """Against all sixteen distances in float64; where two levels are equally near, either will do."""
    weight = weight_of(kind)
    packed = quantize_nf4(weight, double_quant=False)
    back = dequantize_nf4(packed).flatten().double()
    flat = weight.flatten().double()
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        absmax = block.abs().max()
        nearest = (block[:, None] - NF4_CODE.double() * absmax).abs().amin(dim=1)
        assert ((block - back[start : start + 64]).abs() - nearest).max() <= 1e-6 * absmax
    assert back.view(weight.shape).shape == weight.shape


def test_the_error_on_normal_data_is_the_published_one():
    torch.manual_seed(0)
    x = torch.randn(2**20)
    plain, double = (dequantize_nf4(quantize_nf4(x, double_quant)) for double_quant in (False, True))
    assert (plain - x).abs().mean().item() == pytest.approx(0.0729, abs=2e-4)
    squared = ((plain - x) ** 2).mean().item()
    assert squared == pytest.approx(0.00847, abs=1e-4)
    assert ((double - x) ** 2).mean().item() == pytest.approx(squared, rel=0.01)


def test_double_quantisation_takes_4_127_bits_a_weight():
    linear = NF4Linear(torch.randn(4096, 1024))
    size = sum(p.numel() * p.element_size() for p in linear.parameters())
    assert size * 8 / (4096 * 1024) == pytest.approx(4.127, abs=0.001)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [NF4Linear, Int8Linear])
def test_nan_and_infinity_are_refused(bad, kind):
    weight = torch.randn(8, 64)
    weight[3, 5] = bad
    with pytest.raises(QuantError, match="holds NaN or infinity"):
        kind(weight)


@pytest.mark.parametrize("weight", [torch.empty(0, 64), torch.ones(2, 64, dtype=torch.int8)])
def test_what_holds_no_numbers_is_refused(weight):
    with pytest.raises(QuantError, match="cannot be quantised"):
        quantize_nf4(weight)


def test_processes_that_pack_a_weight_together_get_the_bytes_of_one():
    weight = torch.randn(701, 513)  # 3 pieces, the last with half a block and an odd number of weights
    whole, parts = quantize_nf4(weight), [[], [], []]
    for rank in range(3):
        quantize_nf4(weight, among=(rank, 3, parts[rank].append))
    assert all(part[0].any() and not torch.equal(part[0], whole.data) for part in parts)  # each did some, none did all
    sums = [sum(same) for same in zip(*parts, strict=True)]
    joined = quantize_nf4(weight, among=(1, 3, lambda tensor: tensor.copy_(sums.pop(0))))
    for name in ("data", "absmax", "nested", "offset"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name


@pytest.mark.live
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_bytes_and_scales_are_bitsandbytes(kind, dtype):
    """The double-quantised scales are compared with its reference code: its compiled CPU path takes the neighbouring level
    where a scale lies almost half-way between two."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = weight_of(kind, dtype)
    data, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
    packed = quantize_nf4(weight, double_quant=False)
    assert torch.equal(packed.data, data.flatten()) and torch.equal(packed.absmax, state.absmax)
    theirs = functional.dequantize_4bit(data, state).reshape(weight.shape)
    assert torch.equal(dequantize_nf4(packed, dtype), theirs)

    data, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    packed = quantize_nf4(weight)
    assert torch.equal(packed.data, data.flatten())
    assert torch.equal(packed.nested, state.state2.absmax) and torch.equal(packed.offset, state.offset)
    apart = (packed.absmax.int() - state.absmax.int()).abs()
    counts = (
        packed.nested.repeat_interleave(256)[: len(apart)] > 0
    )  # where all scales are equal, their level times 0 says nothing
    assert not counts.any() or (apart[counts].max() <= 1 and (apart[counts] > 0).float().mean() < 0.02)
    packed = packed._replace(absmax=state.absmax)  # from their scales our lines make their weights
    assert torch.equal(dequantize_nf4(packed, dtype), functional.dequantize_4bit(data, state).reshape(weight.shape))


@pytest.mark.live
def test_both_code_books_are_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(DYNAMIC_CODE, functional.create_dynamic_map(signed=True))
    assert torch.equal(UNSIGNED_CODE, functional.create_dynamic_map(signed=False))
    assert torch.equal(NF4_CODE, functional.get_4bit_type("nf4", device="cpu"))


def test_blockwise_ties_go_to_the_lower_level():
    code = torch.tensor([-1.0, 0.0, 1.0])
    indices, absmax = quantize_blockwise(torch.tensor([0.5, -0.5, 1.0, 0.51]), code, 4)
    assert indices.tolist() == [1, 0, 2, 2] and absmax.tolist() == [1.0]


# ---------------------------------------------------------------------------------------------------------------------
# The linears


@pytest.mark.parametrize("kind", [NF4Linear, Int8Linear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_are_those_of_the_dequantised_weight_to_the_bit(kind, dtype):
    torch.manual_seed(0)
    linear = kind(torch.randn(48, 128))
    x, other = (torch.randn(7, 128).to(dtype).requires_grad_() for _ in range(2))
    other.data.copy_(x.data)
    ours = linear(x)
    plain = F.linear(other, linear.dequantize(dtype))
    grad = torch.randn(7, 48).to(dtype)
    ours.backward(grad)
    plain.backward(grad)
    assert torch.equal(ours, plain) and torch.equal(x.grad, other.grad)
    assert all(p.grad is None for p in linear.parameters())


@pytest.mark.parametrize("kind", [NF4Linear, Int8Linear])
def test_casting_a_model_changes_no_scale(kind):
    linear = kind(torch.randn(48, 128))
    before = linear.dequantize(torch.float32)
    assert torch.equal(linear.bfloat16().dequantize(torch.float32), before)


@pytest.mark.parametrize("kind", [NF4Linear, Int8Linear])
def test_backward_keeps_neither_the_input_nor_a_16_bit_weight(kind):
    saved = []
    linear = kind(torch.randn(48, 128))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(torch.randn(7, 128, requires_grad=True)).sum()
    assert not saved  # the control: a plain linear with a frozen weight saves the weight itself
    frozen = nn.Linear(128, 48, bias=False).requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        frozen(torch.randn(7, 128, requires_grad=True)).sum()
    assert saved


GPU = torch.cuda.is_available()
KERNEL = pytest.mark.skipif(triton is None, reason="triton is not installed")
# Without a GPU Triton's interpreter runs the kernels. It cuts bf16 off where hardware rounds, so bf16 is for a GPU.
KERNEL_DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU


@pytest.mark.live
@KERNEL
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(48, 256), (33, 64), (70, 512)])
def test_the_dequantising_kernel_equals_the_plain_lines_to_the_bit(shape, double_quant, dtype):
    torch.manual_seed(0)
    packed = quantize_nf4(torch.randn(shape, device="cuda" if GPU else "cpu"), double_quant)
    assert torch.equal(dequantize_triton(packed, dtype), dequantize_plain(packed, dtype))


@pytest.mark.live
@KERNEL
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize(("shape", "double_quant"), [((48, 256), True), ((33, 768), True), ((16, 512), False)])
def test_the_matrix_vector_kernel_is_the_product_with_the_dequantised_weight(shape, double_quant, rows, dtype):
    torch.manual_seed(0)
    device = "cuda" if GPU else "cpu"
    packed = quantize_nf4(torch.randn(shape, device=device), double_quant)
    x = torch.randn(rows, shape[1], device=device, dtype=dtype)
    # For one row a weight is not rounded to dtype.
    x64, weight = x.double(), dequantize_plain(packed, torch.float32 if rows == 1 else dtype).double()
    exact = x64 @ weight.T
    error = (matvec_triton(x, packed).double() - exact).abs()
    # The result is rounded once to dtype; before that the sums are fp32's, which tensor cores cut off where others round.
    assert (error <= torch.finfo(dtype).eps * exact.abs() + 2 ** (-20 if GPU else -23) * (x64.abs() @ weight.abs().T)).all()


@pytest.mark.live
@KERNEL
def test_the_kernels_follow_rows_in_another_order():
    """Reordered rows have nested scales of fewer absmax than 256: a kernel that divides by 256 reads the wrong ones."""
    torch.manual_seed(0)
    packed = quantize_nf4(torch.randn(128, 768, device="cuda" if GPU else "cpu"))
    moved = reordered(packed, torch.randperm(128))
    assert moved.nested_block < packed.nested_block
    assert torch.equal(dequantize_triton(moved, torch.float16), dequantize_plain(moved, torch.float16))
    for rows in (1, 2):
        x = torch.randn(rows, 768, device=packed.data.device)
        assert torch.allclose(matvec_triton(x, moved), F.linear(x, dequantize_plain(moved, x.dtype)), atol=1e-4)


def adamw_state(n, dtype):
    """A weight and moments as no step has touched them, for adamw_op."""
    codes = [torch.zeros(n, dtype=torch.uint8) for _ in range(2)]
    return [torch.randn(n).to(dtype), *codes, *(torch.zeros(-(-n // 256)) for _ in range(2))]


def adamw_numbers(step):
    """1 - rate x decay, both betas, the rate, and what Adam divides the mean square by, eps: as AdamW8bit.step has them."""
    return [1 - 1e-2 * 0.1, 0.9, 0.999, 1e-2 / (1 - 0.9**step), 1 - 0.999**step, 1e-8]


@pytest.mark.live
@KERNEL
@pytest.mark.parametrize("n", [4096, 256 * 37 + 100])
def test_the_adamw_kernel_steps_as_the_plain_lines_do(n):
    """Sums are rounded otherwise, so that a moment halfway between two levels may be packed as its neighbour."""
    torch.manual_seed(0)
    ours = adamw_state(n, torch.float32)
    plain = [x.clone() for x in ours]
    before = ours[0].clone()
    for step in range(1, 6):
        grad = torch.randn(n) * torch.rand(n) ** 3
        if GPU:
            ours = [x.cuda() for x in ours]
        adamw_triton(ours[0], grad.to(ours[0].device), *ours[1:], adamw_numbers(step), step)
        ours = [x.cpu() for x in ours]
        adamw_plain(plain[0], grad, *plain[1:], numbers=adamw_numbers(step), random=None)
    assert (plain[0] - before).abs().max() > 0.03
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(ours[1:3], plain[1:3], strict=True):
        apart = (mine.int() - theirs.int()).abs()
        assert apart.max() <= 1 and apart.float().mean() < 1e-3 and len(theirs.unique()) > 50
    for mine, theirs in zip(ours[3:], plain[3:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)


@pytest.mark.live
@KERNEL
def test_the_adamw_kernel_rounds_bf16_weights_by_chance_and_by_its_seed_alone():
    torch.manual_seed(0)
    device = "cuda" if GPU else "cpu"

    def stepped(seed):
        torch.randn(3)  # what else was drawn does not matter
        state = [x.to(device) for x in adamw_state(2**14, torch.bfloat16)]
        state[0].fill_(1.0)
        grad = torch.ones(2**14, device=device, dtype=torch.bfloat16)
        adamw_triton(state[0], grad, *state[1:], [1.0, 0.9, 0.999, 2**-9 / (1 - 0.9), 1 - 0.999, 1e-8], seed)
        return state[0].float().cpu()

    weight = stepped(1)
    assert weight.unique().tolist() == [1 - 2**-8, 1.0]  # the step of 2^-9 is half of the last bit
    assert weight.mean().item() == pytest.approx(1 - 2**-9, abs=1e-4)
    assert torch.equal(weight, stepped(1)) and not torch.equal(weight, stepped(2))


COMPILES = """
import sys, torch
torch.cuda.is_available = lambda: True  # so that quant.py has its kernels
import quant
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

capability, dtype, double_quant = int(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3] == "True"
kinds = {torch.uint8: "*u8", torch.int32: "*i32", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}

class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        return self
    def __call__(self, *values, **options):
        names = self.kernel.arg_names
        values = dict(zip(names, values)) | {name: options.pop(name) for name in names if name in options}
        fixed = {p.name: values[p.name] for p in self.kernel.params if p.is_constexpr}
        kind = lambda value: kinds[value.dtype] if isinstance(value, torch.Tensor) else {float: "fp32", int: "i32"}[type(value)]
        signature = {name: "constexpr" if name in fixed else kind(value) for name, value in values.items()}
        source = ASTSource(self.kernel, signature, constexprs=fixed)
        made = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        print(len(made.asm["cubin"]), made.metadata.shared)

packed = quant.quantize_nf4(torch.randn(32, 512), double_quant)
for name in ("dequantize_kernel", "matvec_kernel", "few_rows_kernel", "adamw_kernel"):
    setattr(quant, name, Compiled(getattr(quant, name)))
quant.dequantize_triton(packed, dtype)
for rows in (1, 3):
    quant.matvec_triton(torch.randn(rows, 512).to(dtype), packed)
codes, absmax = torch.zeros(2, 4096, dtype=torch.uint8), torch.zeros(2, 16)
quant.adamw_triton(torch.randn(4096).to(dtype), torch.randn(4096).to(dtype), *codes, *absmax, [0.1] * 6, 7)
"""


@pytest.mark.live
@KERNEL
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    ("gpu", "dtype"), [(75, "float16"), (75, "float32"), (86, "bfloat16"), (86, "float32"), (90, "bfloat16"), (90, "float16")]
)
def test_the_kernels_compile_to_the_machine_code_of_gpus_and_fit_the_shared_memory_of_the_smallest(gpu, dtype, double_quant):
    """The interpreter accepts what the compiler refuses, such as two returns of different types; no GPU is needed to compile.
    A T4 (75) has 64 KB of shared memory, an RTX 3090 (86) 99, an H100 (90) 227."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILES, str(gpu), dtype, str(double_quant)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sizes, shared = zip(*(map(int, line.split()) for line in done.stdout.splitlines()), strict=True)
    assert len(sizes) == 4 and min(sizes) > 1000 and max(shared) <= 64 * 1024


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_operators_tell_fake_tensors_what_real_ones_do(double_quant):
    packed = quantize_nf4(torch.randn(6, 64), double_quant)
    parts = (packed.data, packed.absmax, packed.nested, packed.offset, packed.shape)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(dequantize_op, (*parts, torch.bfloat16), test_utils=checks)
    torch.library.opcheck(nf4_linear_op, (torch.randn(3, 64), *parts), test_utils=checks)


class FromTheHost(TorchDispatchMode):
    """Counts the copies from the host's memory to the meta device, which stands here for a GPU."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.count += op is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and out.is_meta
        return out


def test_tables_of_levels_reach_a_gpu_once():
    """A CUDA graph cannot record a copy from the host's memory, and the plain lines are in it for rows that the kernel cannot
    read, such as those of 192 numbers in tiny/."""
    quant.on_device.cache_clear()
    packed = PackedNF4(*(x.to("meta") for x in quantize_nf4(torch.randn(8, 192))[:4]), (8, 192))
    with FromTheHost() as first:
        linear_plain(torch.randn(1, 192, device="meta"), packed)
    with FromTheHost() as later:
        for of in (packed, packed._replace(shape=(12, 128))):
            linear_plain(torch.randn(1, of.shape[1], device="meta"), of)
            dequantize_plain(of, torch.bfloat16)
    assert (first.count, later.count) == (2, 0)  # the pairs of levels, and those of double quantisation


@KERNEL
def test_a_kernel_is_launched_on_the_gpu_of_its_tensors(monkeypatch):
    """Triton takes the current GPU, which need not be the one of the tensors."""
    current, launched = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append(list(current))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for name in ("dequantize_kernel", "matvec_kernel", "few_rows_kernel", "adamw_kernel"):
        monkeypatch.setattr(quant, name, Kernel())
    packed = quantize_nf4(torch.randn(16, 256))
    dequantize_triton(packed, torch.float32)
    for rows in (1, 2):
        matvec_triton(torch.randn(rows, 256), packed)
    adamw_triton(*torch.randn(2, 4096), *torch.zeros(2, 4096, dtype=torch.uint8), *torch.zeros(2, 16), [0.1] * 6, 1)
    assert launched == [[torch.device("cpu")]] * 4


def test_rows_in_another_order_are_the_same_rows_to_the_bit():
    torch.manual_seed(0)
    weight, order = torch.randn(96, 768), torch.randperm(96)
    for double_quant in (True, False):
        packed = quantize_nf4(weight, double_quant)
        moved = reordered(packed, order)
        assert torch.equal(dequantize_nf4(moved), dequantize_nf4(packed)[order])
        assert moved.nested is None or moved.nested_block == 4  # of 12 blocks a row and 256 under a scale
    with pytest.raises(QuantError, match="rows of 71 numbers, not whole blocks of 64"):
        reordered(quantize_nf4(torch.randn(64, 71)), torch.randperm(64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_int8s_product_without_backward_is_that_of_the_weight_made_again(dtype):
    """It takes the int8 rows as they are, for a few tokens or a prompt; only roundings to dtype and the order of sums differ."""
    linear, precision = Int8Linear(torch.randn(800, 8192) * torch.rand(800, 1)), torch.finfo(dtype).eps  # more than a piece
    for shape in ((1, 8192), (16, 8192), (2, 3, 8192), (17, 8192), (2, 9, 8192)):
        x = (torch.randn(shape) * 50).to(dtype)  # whose products with 127 fp16 does not hold
        expected = x.double() @ linear.dequantize(torch.float64).T
        assert linear(x).shape == expected.shape and linear(x).dtype == dtype
        assert ((linear(x) - expected).abs() <= (2 * precision + 1e-5) * (expected.abs() + expected.std())).all()


def test_int8_rows_are_within_half_a_step_of_the_weight():
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((Int8Linear(weight).dequantize(torch.float32) - weight).abs() <= step * 0.5001).all()
    assert torch.equal(Int8Linear(torch.zeros(2, 4)).dequantize(torch.float32), torch.zeros(2, 4))


# ---------------------------------------------------------------------------------------------------------------------
# The model


@pytest.fixture
def base(tmp_path, tiny_llama, tokenizer_file):
    save_meta(tiny_llama(vocab_size=340, dim=64, hidden_dim=128), tmp_path / "base")
    (tmp_path / "base" / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    records = [{"prompt": f"Where {i}?", "response": "Mira lives in Oakford."} for i in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


@pytest.mark.parametrize("kind", [NF4Linear, Int8Linear])
def test_loading_quantises_every_linear_of_the_blocks_and_nothing_else(base, kind):
    model = load_model(base / "base", quantize=kind)
    plain = load_model(base / "base")
    quantised = {name for name, module in model.named_modules() if isinstance(module, kind)}
    assert quantised == {name for name, m in plain.named_modules() if isinstance(m, nn.Linear) and name != "output"}
    assert len(quantised) == 2 * 7
    for name, weight in plain.named_parameters():
        if name.removesuffix(".weight") not in quantised:
            assert torch.equal(model.get_parameter(name), weight)
    tokens = torch.arange(3, 60)
    difference = (model(tokens) - plain(tokens)).abs().mean() / plain(tokens).abs().mean()
    assert 0 < difference < (0.05 if kind is Int8Linear else 0.6)


def test_a_weight_that_cannot_be_quantised_is_named(base):
    weights = torch.load(base / "base" / "consolidated.00.pth", weights_only=True)
    weights["layers.1.feed_forward.w2.weight"][0, 0] = float("nan")
    torch.save(weights, base / "base" / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"layers.1.feed_forward.w2.weight holds NaN or infinity"):
        load_model(base / "base", quantize=NF4Linear)


# ---------------------------------------------------------------------------------------------------------------------
# bitsandbytes' 4-bit files

SIZES = {"dim": 256, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 640, "vocab_size": 96}
# q of 512 rows of 8 blocks: 16 nested groups, which the heads' row order tears apart.
TORN = {"dim": 512, "n_heads": 4, "n_kv_heads": 4, "hidden_dim": 640, "vocab_size": 96}


@pytest.fixture
def written(tiny_llama, tmp_path):
    """A folder in bitsandbytes' layout, written from a model quantised here, and that model."""

    def make(sizes=SIZES):
        save_hf(tiny_llama(**sizes).bfloat16(), tmp_path / "whole")
        model = load_model(tmp_path / "whole", dtype=torch.bfloat16, quantize=NF4Linear)
        save_hf(model, tmp_path / "nf4", max_shard_bytes=300_000)
        return tmp_path / "nf4", model

    return make


def dequantised(model) -> dict[str, torch.Tensor]:
    return {n: m.dequantize(torch.float32) for n, m in model.named_modules() if isinstance(m, NF4Linear)}


@pytest.mark.parametrize("sizes", [SIZES, TORN])
def test_a_4_bit_folder_read_back_has_the_same_weights_to_the_bit(sizes, written):
    folder, model = written(sizes)
    back = load_model(folder, dtype=torch.bfloat16, quantize=NF4Linear)
    theirs = dequantised(back)
    assert all(torch.equal(weight, theirs[name]) for name, weight in dequantised(model).items())
    for name in ("tok_embeddings", "norm", "output"):
        assert torch.equal(model.get_submodule(name).weight, back.get_submodule(name).weight)


@pytest.mark.live
@pytest.mark.parametrize("sizes", [SIZES, TORN])
def test_transformers_and_bitsandbytes_open_a_4_bit_folder_with_the_same_weights(sizes, written):
    transformers, functional = pytest.importorskip("transformers"), pytest.importorskip("bitsandbytes.functional")
    folder, model = written(sizes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, weight in dequantised(model).items():
        hf_name, weight = to_hf(f"{name}.weight", weight, model.config)
        packed = theirs.get_parameter(hf_name)
        assert torch.equal(functional.dequantize_4bit(packed.data, packed.quant_state), weight.bfloat16()), name
    tokens = torch.randint(96, (1, 12))
    exact = load_model(folder, dtype=torch.float32, quantize=NF4Linear)(tokens[0])
    ours, said = ((logits.float() - exact).norm() / exact.norm() for logits in (model(tokens[0]), theirs(tokens).logits[0]))
    assert ours < 0.1 and said < 0.1  # both computed in bf16


@pytest.mark.live
def test_a_trained_model_packed_here_says_the_same_in_transformers(tmp_path):
    """tiny, not random weights: their likeliest tokens are often ties to within bf16, in which bitsandbytes computes on a CPU."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    save_hf(load_model(REPOSITORY / "tiny", quantize=NF4Linear), tmp_path)
    model = load_model(tmp_path, quantize=NF4Linear)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = Tokenizer(REPOSITORY / "tiny" / "tokenizer.model")
    for line in (REPOSITORY / "tiny" / "held_out.jsonl").read_text().splitlines()[:8]:
        prompt = [1, *tokenizer.encode(json.loads(line)["messages"][0]["content"].split("?")[0])]
        said = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert list(generate(model, prompt, Sampling(max_new_tokens=24))) == said[0, len(prompt) :].tolist()


@pytest.mark.live
def test_what_transformers_saves_in_4_bits_is_read_exactly_and_written_back_byte_for_byte(tiny_llama, tmp_path):
    transformers, functional = pytest.importorskip("transformers"), pytest.importorskip("bitsandbytes.functional")
    save_hf(tiny_llama(**TORN).bfloat16(), tmp_path / "whole")
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16, quantization_config=how)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs", dtype=torch.bfloat16, quantize=NF4Linear)
    for name, weight in dequantised(model).items():
        hf_name, weight = to_hf(f"{name}.weight", weight, model.config)
        packed = theirs.get_parameter(hf_name)
        assert torch.equal(functional.dequantize_4bit(packed.data, packed.quant_state), weight.bfloat16()), name
    save_hf(model, tmp_path / "again")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.live
@pytest.mark.parametrize("skipped", [["lm_head", "model.layers.1.mlp.down_proj"], ["nothing: the head is packed too"]])
def test_which_linears_transformers_packed_is_kept_and_told_again(skipped, tiny_llama, tmp_path):
    """A layer is left in 16 bits because too much would be lost: to pack it here all the same gives other logits."""
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("bitsandbytes")
    save_hf(tiny_llama(**SIZES), tmp_path / "whole")
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped)
    llama, tokens = transformers.AutoModelForCausalLM, torch.arange(3, 60)
    theirs = llama.from_pretrained(tmp_path / "whole", dtype=torch.float32, quantization_config=how)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs", quantize=NF4Linear)
    assert type(model.output) is nn.Linear and len(dequantised(model)) == 14 - (len(skipped) - 1)
    save_hf(model, tmp_path / "again")
    again = load_model(tmp_path / "again", quantize=NF4Linear)
    there = llama.from_pretrained(tmp_path / "again", dtype=torch.float32)
    expected = theirs(tokens[None]).logits[0]
    for logits in (model(tokens), again(tokens), there(tokens[None]).logits[0]):
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_linear_that_a_4_bit_folder_has_in_16_bits_stays_so(written):
    folder, model = written()
    name, linear = "model.layers.1.self_attn.o_proj.weight", model.layers[1].attention.wo
    for file in folder.glob("*.safetensors"):
        tensors = {key: tensor for key, tensor in load_file(file).items() if not key.startswith(f"{name}.")}
        save_file(tensors | ({name: linear.dequantize(torch.bfloat16)} if name in tensors else {}), file)
    read = load_model(folder, dtype=torch.bfloat16, quantize=NF4Linear)
    assert torch.equal(read.layers[1].attention.wo.weight, linear.dequantize(torch.bfloat16))
    assert dequantised(read).keys() == dequantised(model).keys() - {"layers.1.attention.wo"}


def without(part):
    return lambda tensors: tensors.pop(f"model.layers.1.self_attn.o_proj.weight.{part}")


def with_state(**fields):
    def change(tensors):
        name = "model.layers.1.self_attn.o_proj.weight.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[name].tolist())) | fields
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def as_fp4(tensors):
    state = tensors.pop("model.layers.1.self_attn.o_proj.weight.quant_state.bitsandbytes__nf4")
    tensors["model.layers.1.self_attn.o_proj.weight.quant_state.bitsandbytes__fp4"] = state


def made(part, change):
    def make(tensors):
        name = f"model.layers.1.self_attn.o_proj.weight.{part}"
        tensors[name] = change(tensors[name])

    return make


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("absmax"), "layers.1.attention.wo.weight is packed, but its absmax is missing"),
        (without("nested_absmax"), "layers.1.attention.wo.weight is packed, but its nested_absmax is missing"),
        (without("quant_map"), "layers.1.attention.wo.weight is packed, but its quant_map is missing"),
        (without("quant_state.bitsandbytes__nf4"), "wo.weight is packed, but its quant_state.bitsandbytes__nf4 is missing"),
        (with_state(blocksize=128), "wo.weight is packed in blocks of 128"),
        (with_state(shape=[2, 2]), r"wo.weight is packed in blocks of 64 with shape \(2, 2\)"),
        (with_state(nested_offset="0,1"), "wo.weight has a quant_state.bitsandbytes__nf4 that cannot be read: could not convert"),
        (as_fp4, "wo.weight is packed as fp4, and only nf4 is read"),
        (made("quant_map", lambda x: x * 0.9), "wo.weight has a quant_map with other levels than NF4"),
        (made("absmax", torch.Tensor.float), "wo.weight is packed as torch.uint8 with absmax as torch.float32"),
        (made("nested_absmax", lambda x: x * math.inf), "wo.weight has scales that are NaN or infinity"),
    ],
)
def test_a_broken_4_bit_folder_is_refused_by_the_tensors_name(change, sentence, written):

    folder, _ = written()
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / index["model.layers.1.self_attn.o_proj.weight"]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=sentence):
        load_model(folder, quantize=NF4Linear)


@pytest.mark.parametrize(
    ("packing", "sentence"),
    [
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "quantised by torchao; only bitsandbytes' nf4 is read"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantised by bitsandbytes, in 8 bits; only"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "by bitsandbytes, as fp4; only"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "by bitsandbytes, as fp4; only"),  # what it does if not told
        ({"quant_method": "gptq", "bits": 4}, "quantised by gptq; only"),
    ],
)
def test_other_quantised_layouts_are_refused_by_name(packing, sentence, written):
    folder, _ = written()
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": packing}))
    with pytest.raises(CheckpointError, match=sentence):
        load_model(folder, quantize=NF4Linear)


@pytest.mark.parametrize("quantize", [None, Int8Linear])
def test_a_4_bit_folder_opened_as_anything_else_says_which_flag_reads_it(quantize, written):
    folder, _ = written()
    with pytest.raises(CheckpointError, match="is packed in 4 bits: --quantize nf4, or --method qlora, uses it so"):
        load_model(folder, quantize=quantize)


def test_a_model_saved_in_4_bits_answers_and_trains_as_the_one_quantised_while_loading(base, monkeypatch, capsys):
    def run(model, *flags):
        flags = ["--model", str(base / model), "--quantize", "nf4", "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", ["generate.py", *flags])
        generate_script.main()
        return capsys.readouterr().out

    answered = run("base", "--prompt", "aaa", "--max_new_tokens", "12")
    assert "saved in" in run("base", "--save", str(base / "packed"))
    assert run("packed", "--prompt", "aaa", "--max_new_tokens", "12") == answered
    flags = {"method": "qlora", "data": [str(base / "data.jsonl")], "max_steps": 3, "logging_steps": 1, "device": "cpu"}
    losses = []
    for model in ("base", "packed"):
        rows = train(complete(flags | {"model": str(base / model), "output_dir": str(base / f"run_{model}")}))
        losses.append([row["loss"] for row in rows])
    assert losses[0] == losses[1]


def test_a_4_bit_save_of_rows_that_are_no_whole_blocks_names_the_weight(tiny_llama, tmp_path):
    save_hf(tiny_llama(), tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"layers.0.attention.wq.weight has rows of 32 numbers"):
        save_hf(load_model(tmp_path / "base", quantize=NF4Linear), tmp_path / "packed")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--quantize", "int8", "--save", "x"], "--save has no layout for int8"),
        (["--adapter", "runs/lora", "--save", "x"], "--save writes a model without an adapter"),
        (["--save", "."], "--save . exists already: name a new folder"),
        (["--save", ""], "--save  exists already: name a new folder"),
    ],
)
def test_a_save_that_cannot_be_is_refused(flags, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        generate_script.main()
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_merged_qlora_model_is_the_dequantised_sum_in_bf16(base):
    model = add_lora(load_model(base / "base", quantize=NF4Linear), rank=4)
    for p in lora_parameters(model).values():
        p.data.normal_(std=0.1)
    wq = model.layers[0].attention.wq
    expected = (wq.base.dequantize(torch.bfloat16).float() + wq.scaling * wq.lora_B @ wq.lora_A).to(torch.bfloat16)
    merged = merge_lora(model)
    assert torch.equal(merged.layers[0].attention.wq.weight, expected)
    assert not any(isinstance(module, NF4Linear | LoRALinear) for module in merged.modules())


@pytest.mark.parametrize("settings", [{"method": "lora"}, {"method": "qlora", "lora_targets": ["wq"]}])
def test_merge_writes_a_whole_model_that_answers_as_the_adapter_did(base, settings, monkeypatch, capsys):
    more = {"model": str(base / "base"), "data": [str(base / "data.jsonl")], "max_steps": 4, "learning_rate": 1e-2}
    train(complete(more | {"output_dir": str(base / "run"), "device": "cpu", "model_max_length": 64} | settings))
    out = base / "new" / "merged"
    monkeypatch.setattr(sys, "argv", ["generate.py", "--adapter", str(base / "run"), "--merge", str(out), "--device", "cpu"])
    generate_script.main()
    changed = float(capsys.readouterr().out.split()[-1])
    adapted, _, _ = load(GenerateConfig(adapter=(str(base / "run"),), device="cpu"))
    merged, tokenizer, _ = load(GenerateConfig(model=str(out), device="cpu"))
    tokens = torch.arange(3, 60)
    exact = settings["method"] == "lora"
    assert (merged(tokens) - adapted(tokens)).abs().max() < (1e-4 if exact else 0.5)
    assert changed < (1e-4 if exact else 0.5)
    stored = json.loads((out / "config.json").read_text())["torch_dtype"]
    assert stored == ("float32" if exact else "bfloat16") and tokenizer.vocab_size == 340
    with pytest.raises(SystemExit):  # what exists is not written over
        generate_script.main()
    assert "exists already" in capsys.readouterr().err


def learns_and_resumes_exactly(base, settings):
    """Six steps in one go, and the last three of them again from the checkpoint after the third, in base / "run"."""
    more = {"model": str(base / "base"), "data": [str(base / "data.jsonl")], "max_steps": 6, "save_steps": 3, "logging_steps": 1}
    more |= {"learning_rate": 1e-2, "device": "cpu", "model_max_length": 64} | settings
    whole = train(complete(more | {"output_dir": str(base / "whole")}))
    assert whole[-1]["loss"] < whole[0]["loss"]
    train(complete(more | {"output_dir": str(base / "run")}))
    shutil.rmtree(base / "run" / "checkpoint-6")
    next((base / "run").glob("*model.safetensors")).unlink()
    resumed = train(complete({"resume": True, "output_dir": str(base / "run")}))
    assert [row["loss"] for row in resumed] == [row["loss"] for row in whole]


@pytest.mark.parametrize(("settings", "kind"), [({"method": "qlora"}, NF4Linear), ({"quantize": "int8"}, Int8Linear)])
def test_a_quantised_run_trains_resumes_and_is_asked_as_it_was_trained(base, settings, kind):
    learns_and_resumes_exactly(base, settings)
    model, _, _ = load(GenerateConfig(adapter=(str(base / "run"),), device="cpu"))
    assert isinstance(model.layers[0].attention.wq.base, kind)
    model, _, _ = load(GenerateConfig(adapter=(str(base / "run"),), device="cpu", quantize="none"))
    assert isinstance(model.layers[0].attention.wq.base, nn.Linear)


def test_contradictions_are_refused(base):
    with pytest.raises(RunError, match="--quantize nf4 freezes the weights and --method full trains them"):
        complete({"method": "full", "quantize": "nf4"})
    with pytest.raises(RunError, match="--method qlora is lora with --quantize nf4, not int8"):
        complete({"method": "qlora", "quantize": "int8"})


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer


def losses_from_scratch(make_optimizer, steps):
    """Losses of a small model on tiny's prompts and replies alike: names cannot be foretold, so the loss never falls to noise."""
    torch.manual_seed(0)
    model = Llama(ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=4, hidden_dim=160, vocab_size=1280))
    optimizer = make_optimizer(list(model.parameters()))
    records = [json.loads(line)["messages"] for line in (REPOSITORY / "tiny" / "instructions.jsonl").read_text().splitlines()]
    tokenizer = Tokenizer(REPOSITORY / "tiny" / "tokenizer.model")
    documents, _ = encode_documents(records, tokenizer, TEMPLATES["llama2"], max_length=128, train_on_inputs=True)
    batches = PackedBatches(documents, 128)
    losses = []
    for step in range(steps):
        batch = batches.batch(0, step)
        loss = model(**batch) / (batch["labels"] >= 0).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses), optimizer


def test_8_bit_adamw_follows_adamws_losses_within_1_percent_in_2_bytes_a_weight():
    exact, _ = losses_from_scratch(lambda params: torch.optim.AdamW(params, lr=2e-3, weight_decay=0.01), 200)
    ours, optimizer = losses_from_scratch(lambda params: AdamW8bit(params, lr=2e-3, weight_decay=0.01), 200)
    control, _ = losses_from_scratch(lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.01), 50)
    apart = (ours / exact - 1).abs()
    assert apart.mean() < 0.01 and exact[-20:].mean() < 0.5 * exact[0]
    assert (control / exact[:50] - 1).abs().mean() > 0.02  # half the rate is told apart
    state = [(p.numel(), sum(x.nbytes for x in s.values() if torch.is_tensor(x))) for p, s in optimizer.state.items()]
    large = [(n, size) for n, size in state if n >= 4096]
    assert sum(size for _, size in large) / sum(n for n, _ in large) == pytest.approx(2, abs=0.05)


def test_8_bit_adamw_is_adamw_where_its_moments_are_fp32():
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.linspace(-1, 1, n)) for n in (4000, 100, 7)] for _ in range(2))
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}
    optimizers = AdamW8bit(ours, **options), torch.optim.AdamW(theirs, **options)
    for _ in range(5):
        for mine, other in zip(ours[:2], theirs, strict=False):  # the last has no gradient, and stays
            mine.grad = other.grad = torch.randn_like(mine) * 1e-2
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_8_bit_adamw_does_the_same_in_pieces():
    torch.manual_seed(0)
    pieces = adamw_state(3 * 2**15 + 100, torch.float32)  # a piece has 2^16
    whole = [x.clone() for x in pieces]
    for step in range(1, 4):
        grad = torch.randn_like(whole[0])
        adamw_op(pieces[0], grad, *pieces[1:], adamw_numbers(step), step)
        adamw_plain(whole[0], grad, *whole[1:], numbers=adamw_numbers(step), random=None)
    assert all(torch.equal(x, y) for x, y in zip(pieces, whole, strict=True))


@pytest.mark.parametrize("packed", [True, False])
def test_the_optimizers_operator_says_what_it_changes(packed):
    weight, mean, square, *absmax = adamw_state(5000, torch.bfloat16)
    moments = (mean, square, *absmax) if packed else (mean.float(), square.float(), None, None)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(adamw_op, (weight, torch.randn(5000), *moments, adamw_numbers(1), 1), test_utils=checks)


@pytest.mark.parametrize("code", [NF4_CODE, DYNAMIC_CODE, UNSIGNED_CODE], ids=["nf4", "signed", "unsigned"])
def test_the_nearest_level_by_look_up_is_that_by_search(code):
    """Also at each border between two levels, beside it, and for the smallest numbers there are."""
    torch.manual_seed(0)
    borders = (code[:-1] + code[1:]) / 2
    beside = [torch.nextafter(borders, torch.tensor(x)) for x in (-9.0, 9.0)]
    small = 10 ** (torch.rand(10**5) * -9)
    few = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0])
    x = torch.cat([torch.rand(10**5) * 2 - 1, small, -small, code, borders, *beside, few])
    assert torch.equal(nearest_level(x, code), torch.bucketize(x, borders).to(torch.uint8))


def test_stochastic_rounding_keeps_the_mean_and_what_is_a_bf16_already():
    torch.manual_seed(0)
    x = torch.full((200_000,), 1 + 2**-10)  # an eighth of the way from 1 to the next bf16 number
    rounded = stochastic_round(x).float()
    assert rounded.unique().tolist() == [1.0, 1 + 2**-7]
    assert rounded.mean().item() == pytest.approx(1 + 2**-10, abs=2e-5)
    assert (x.bfloat16() == 1).all()  # the control: plain rounding loses the update every time
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(stochastic_round(exact.float()), exact)


def test_each_step_of_each_weight_is_rounded_by_numbers_of_its_own_and_again_by_the_same():
    """By the same numbers each time, half of the weights would never move."""

    def rounded():
        weights = [nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = AdamW8bit(weights, lr=2**-9)  # half of the last bit
        for _ in range(2):
            for weight in weights:
                weight.data.fill_(1)
                weight.grad = torch.ones_like(weight)
            optimizer.step()
            yield from (weight.detach().clone() for weight in weights)

    first = list(rounded())
    assert all(weight.unique().tolist() == [1 - 2**-8, 1] for weight in first)
    assert not any(torch.equal(a, b) for a, b in combinations(first, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, rounded(), strict=True))


@pytest.mark.parametrize("settings", [{"method": "lora"}, {"method": "full"}, {"method": "full", "pure_bf16": True}])
def test_an_8_bit_run_resumes_exactly(base, settings):
    learns_and_resumes_exactly(base, settings | {"optim": "adamw_8bit"})


def test_pure_bf16_with_plain_rounding_or_fp16_is_refused():
    for wrong in ({"optim": "adamw"}, {"optim": "adamw_8bit", "dtype": "fp16"}, {"optim": "adamw_8bit", "method": "lora"}):
        with pytest.raises(RunError, match="--pure_bf16 is for --method full --optim adamw_8bit"):
            complete({"method": "full", "pure_bf16": True} | wrong)


PEAK = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from model import Llama, ModelConfig
from lora import add_lora
from quant import NF4Linear
torch.manual_seed(0)
model = Llama(ModelConfig(dim=512, n_layers=6, n_heads=8, n_kv_heads=8, hidden_dim=1408, vocab_size=256)).bfloat16()
if sys.argv[2] == "nf4":
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "output":
            model.set_submodule(name, NF4Linear(module.weight.detach()))
add_lora(model)
kept = 0
def keep(tensor):
    global kept
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in seen:
        seen.add(storage.data_ptr())
        kept += storage.nbytes()
    return tensor
seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
weights = sum(p.numel() * p.element_size() for p in model.parameters())
tokens = torch.randint(0, 256, (256,))
with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
    loss = model(tokens, labels=tokens)
print(weights, kept)
"""


def test_a_qlora_step_keeps_less_than_the_same_lora_step():
    """What users meet elsewhere: 4-bit runs that need more memory than 16-bit ones, because something was upcast and kept."""

    def measured(how):
        words = [sys.executable, "-c", PEAK, str(REPOSITORY), how]
        return map(int, subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())

    (lora_weights, lora_kept), (nf4_weights, nf4_kept) = measured("none"), measured("nf4")
    assert nf4_weights < 0.4 * lora_weights
    assert nf4_kept <= lora_kept


def test_an_int8_weight_with_rows_of_any_length_is_read_within_its_bounds(monkeypatch):
    """PyTorch's product reads past the end of rows that are not whole vectors: NaN at times, and at times the process ended."""
    asked, product = [], torch._weight_int8pack_mm
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda x, *of: asked.append(x.shape[-1]) or product(x, *of))
    for columns in (32, 56, 64, 100, 128):
        linear, x = Int8Linear(torch.randn(20, columns)), torch.randn(3, columns)
        with torch.no_grad():
            torch.testing.assert_close(linear(x), x @ linear.dequantize(torch.float32).T, rtol=1e-4, atol=1e-4)
    assert asked == [32, 64, 128]
