"""What the launchers have Triton compile, for a device that is not here. Run as a program, for in a
process where Triton is its interpreter there is no compiler:

    python compiled.py FOLDER        writes launches.json, and the PTX of some of them
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from wmtp import kernels
from wmtp.arguments import checked_call, loss_inputs
from wmtp.kernels import tiers
from wmtp.numerics import PLAIN, Numerics, numerics_of
from wmtp.records import Inputs, RowInputs, RowSettings, Settings
from wmtp.weightings import Excess, Given, Uniform, Weighting

TARGET = GPUTarget("cuda", 90, 32)
BACKEND = make_backend(TARGET)
IGNORED = -100
ONE = torch.ones(())
ROWS = RowSettings(ignore_index=IGNORED, backend="triton")
# What a step may vary, the usual first.
CAPS = [
    numerics_of(softcap=cap, z_loss=cap / 1e4, label_smoothing=0.1) for cap in (1.0, 16.0, 30.0)
]
SHAPES = ((2, 5, 4, 1000), (1, 5, 4, 1000), (16, 1, 4, 1000), (2, 16, 4, 1000), (2, 17, 4, 1008),
          (2, 5, 4, 513))  # fmt: skip
NUMBERS = (ONE, torch.tensor(16.0), torch.tensor(0.7, dtype=torch.float64), torch.arange(4.0)[1])
IGNORED_IDS = (IGNORED, 0, 1, 16)
APART = (1 << 20, 1 << 31)  # elements between batches, or heads of their own


class Launched(NamedTuple):
    """What decides which binary a launch asks for."""

    kernel: JITFunction
    specialization: list[tuple[str, Any]]  # of each parameter: its type, or "constexpr"; and more
    options: dict[str, Any]


launched: list[Launched] = []


def run(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """In place of JITFunction.run, whose keys it finds in the same way."""
    bind = create_function_from_signature(self.signature, self.params, BACKEND)
    _, specialization, rest = bind(*arguments, **options)
    launched.append(Launched(self, specialization, rest))


def elsewhere(tensor: torch.Tensor) -> torch.Tensor:
    """The same, one element into its storage: at no multiple of 16 bytes."""
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    assert moved.data_ptr() % 16
    return moved.copy_(tensor)


def loss(
    shape=SHAPES[0], dtype=torch.bfloat16, kind="known", gradient="new", move=torch.clone, *,
    logits=None, temperature=ONE, normalizer=None, ignore_index=IGNORED, numerics: Numerics = PLAIN,
):  # fmt: skip
    batch, length, heads, _ = shape
    rule: Weighting = Uniform()
    if kind == "known":
        rule = Given(move(torch.rand(batch, length, heads)))
    if kind == "excess":
        rule = Excess(move(torch.rand(batch, length - 1)), temperature)
    ids = move(torch.zeros(batch, length, dtype=torch.int64))
    logits = torch.randn(shape).to(dtype) if logits is None else logits
    seen = logits if isinstance(logits, torch.Tensor) else logits[0][:, :, None].expand(shape)
    how = {"reduction": None, "normalizer": normalizer, "horizon": None, "head_prior": None}
    call = checked_call("logits", seen, ids, rule, torch.float32, **how)
    heads = [logits] if isinstance(logits, torch.Tensor) else logits
    inputs = Inputs(logits=heads, **loss_inputs(call, torch.float32))
    inputs.target_ids = ids[:, 1:]
    settings = Settings(
        rule=rule.key(),
        reduction="token_mean",
        ignore_index=ignore_index,
        backend="triton",
        gradient=gradient,
        numerics=numerics,
        metrics=numerics != PLAIN,
    )
    kernels.weighted_loss(inputs, settings)


def launch_losses(dtype: torch.dtype, folder: Path) -> None:
    for kind in ("known", "excess", "uniform"):
        for gradient in ("new", "inplace", "none"):
            for move in (torch.clone, elsewhere):
                loss(SHAPES[0], dtype, kind, gradient, move)
        for shape in SHAPES:
            loss(shape, dtype, kind)
        for number in NUMBERS:
            loss(dtype=dtype, kind=kind, temperature=number)
            loss(dtype=dtype, kind=kind, normalizer=number)
        for ignore_index in IGNORED_IDS:
            loss(dtype=dtype, kind=kind, ignore_index=ignore_index)
        for numerics in CAPS:
            loss(dtype=dtype, kind=kind, numerics=numerics)
            loss(dtype=dtype, kind=kind, numerics=numerics, gradient="none")
    one_row = torch.randn(2, 5, 1, 1000).to(dtype).expand(-1, -1, 4, -1)
    loss(logits=one_row)
    loss(logits=torch.randn(2, 5, 4, 1033).to(dtype)[..., 1:1001])
    for apart in APART:
        file = folder / "logits"  # sparse
        storage = torch.from_file(str(file), True, 2 * apart, dtype=dtype)
        loss(logits=storage.as_strided(SHAPES[0], (apart, 4000, 1000, 1)))
        heads = [storage.as_strided((2, 5, 1000), (5000, 1000, 1), apart * k) for k in (0, 1)]
        loss((2, 5, 2, 1000), logits=heads)


def launch_the_others(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        logits = torch.randn(shape).to(dtype)
        ids, of_rows = torch.zeros(shape[:2], dtype=torch.int64), torch.rand(3, *shape[:3])
        for move in (torch.clone, elsewhere):
            of_heads = move(torch.zeros(shape[:3], dtype=torch.int64))
            for targets in (move(ids), move(ids)[:, 1:], of_heads):
                rows = RowInputs(logits, targets, *map(move, of_rows))
                kernels.row_gradient(rows, ROWS)
            kernels.next_token_ce(logits[:, :, 0], move(ids)[:, 1:], ROWS)
        for number in NUMBERS:
            kernels.multiply_(logits, number.float())
            kernels.multiply_(logits[..., 1:], number.float())
    for rows in (1, 16, 17):
        for first in (0, 1):  # a chunk's targets begin anywhere among all
            ids = torch.zeros(32, dtype=torch.int64)[first : first + rows]
            for scalar in (torch.rand(rows), None):
                kernels.rows_ce_(torch.randn(rows, 1000).to(dtype), ids, scalar, ROWS)


def launch_few_rows(heads: int) -> None:
    """They are split where the device has more processors than that."""
    ordinary = tiers.machine
    tiers.machine = lambda device: ordinary(device)._replace(processors=132)
    for numerics in (PLAIN, CAPS[0]):
        loss((1, 2, heads, 65536), torch.float32, "excess", "none", numerics=numerics)
    tiers.machine = ordinary


@triton.jit
def unrounded_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    """What must not be: a product that is summed up as it is."""
    lane = tl.arange(0, N)
    tl.store(out_ptr, tl.sum(tl.load(a_ptr + lane) * tl.load(b_ptr + lane), axis=0))


def ptx_of(launch: Launched) -> str:
    """Compiled as JITFunction does."""
    signature, constants, attributes = {}, {}, {}
    pairs = zip(launch.kernel.params, launch.specialization, strict=True)
    for parameter, (kind, detail) in pairs:
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = detail
        elif isinstance(detail, str):
            attributes[(parameter.num,)] = BACKEND.parse_attr(detail)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGET, options=launch.options).asm["ptx"]


def main() -> None:
    folder = Path(sys.argv[1])
    JITFunction.run = run
    for dtype in (torch.bfloat16, torch.float32):
        launch_losses(dtype, folder)
        launch_the_others(dtype)
    rows = [
        {
            "kernel": launch.kernel.__name__,
            "parameters": [parameter.name for parameter in launch.kernel.params],
            "specialization": [(kind, str(detail)) for kind, detail in launch.specialization],
            "options": launch.options,
        }
        for launch in launched
    ]
    (folder / "launches.json").write_text(json.dumps(rows))

    chosen = {launch.kernel.__name__: launch for launch in reversed(launched)}  # the first of each
    for heads in (1, 3, 8):
        launched.clear()
        launch_few_rows(heads)
        plain, capped = launched[: len(launched) // 2], launched[len(launched) // 2 :]
        chosen |= {f"{launch.kernel.__name__} {heads}": launch for launch in plain}
        chosen |= {f"{launch.kernel.__name__} {heads}, capped": launch for launch in capped}
    unrounded_kernel[(1,)](*[torch.empty(32)] * 3, N=32, num_warps=1, enable_fp_fusion=True)
    chosen["control"] = launched[-1]
    for name, launch in chosen.items():
        if not name.startswith("weights_kernel"):
            (folder / f"{name}.ptx").write_text(ptx_of(launch))


if __name__ == "__main__":
    main()
