"""What one program of a node moves, multiplies and waits for, from the arguments of its launch.

A rule a kernel, of the shape of its source alone: tiles, loops, which products. No times stand here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, prod

import torch

from benchmarks.gpu_account.recording import Node, Operand

ALL_REGISTERS, WIDE_REGISTERS, FEW_REGISTERS = 255, 128, 32
"""Of a thread: of attention with its projection, of other kernels with products (as benchmarks/results/aot.md has them), and
of those without."""
LIBRARY_TILES = ((128, 128), (128, 256), (256, 128), (64, 256))
"""Rows and columns of cuBLAS's blocks on Hopper, in steps of 64: assumed, from names as nvjet_…_256x128_64x4_1x2_…."""
THREADS, PER_THREAD = 128, 4
"""Of a block of torch's elementwise kernels, and numbers of each thread."""


@dataclass(frozen=True)
class Work:
    """Of a node. Without a unit: of one program.

    programs    of the launch         warps, registers, shared  of one: threads/32, of a thread, bytes
    moved       bytes to and from L2, what its neighbours read as well included
    multicast   of these, what the blocks of a cluster read once for all of them
    cluster     blocks of one, where no library chooses      meets  barriers of a cluster before the first load
    flops       as the unit counts them, padding included      unit  a key of ``price.GPU.peak``
    exponents   of a softmax or an activation
    trips       waits for memory one behind the other: the loop's steps by the loads in flight
    tails       such waits behind the loop, for what is in L2
    operations  products, reductions and barriers one behind the other
    exchanges   waits for what neighbours in the cluster store      exchanged  bytes of these stores
    library     of a vendor      overlapped  exponents run beside products
    """

    programs: int
    moved: float
    warps: int = THREADS // 32
    registers: int = FEW_REGISTERS
    shared: float = 0.0
    flops: float = 0.0
    unit: str = "fma"
    exponents: float = 0.0
    trips: float = 1.0
    tails: float = 0.0
    operations: float = 1.0
    library: bool = False
    overlapped: bool = False
    multicast: float = 0.0
    cluster: int = 1
    meets: float = 0.0
    exchanges: float = 0.0
    exchanged: float = 0.0


Rule = Callable[[Node], Work]


def unit_of(*dtypes: torch.dtype, precision: str = "ieee") -> str:
    """On what products of these operands run."""
    if all(dtype.itemsize == 2 for dtype in dtypes):
        return "bf16"
    return precision if precision in ("tf32", "tf32x3") else "fma"


def _gemm(
    node: Node,
    x: str,
    weight: str,
    inputs: int,
    *,
    products: int = 1,
    tails: float = 0.0,
    activation: bool = False,
) -> Work:
    """Tiles of an output, each the sum over K of steps that are loaded in advance. With a split of K the last program of a
    tile adds up what the others have stored: it waits for its own stores, for the counter, for the parts."""
    a = node.arguments
    rows, cols, depth, split = a["BLOCK_M"], a["BLOCK_N"], a["BLOCK_K"], a.get("SPLIT_K", 1)
    w, out = a[weight].dtype, a.get("y_ptr", a[x])
    steps = ceil(ceil(inputs / depth) / split)
    k, flying = min(steps * depth, inputs), max(a["num_stages"] - 1, 1)
    real_rows = a["rows"] / ceil(a["rows"] / rows)
    moved = k * (real_rows * a[x].dtype.itemsize + products * cols * w.itemsize)
    moved += real_rows * cols * out.dtype.itemsize * (2 if tails else 1) / split
    if split > 1:
        moved += 2 * rows * cols * 4
    if a.get("HAS_NEXT"):
        moved += real_rows * cols * a["next_rows_ptr"].dtype.itemsize / split
    return Work(
        programs=prod(node.grid), moved=moved, warps=a["num_warps"], registers=WIDE_REGISTERS,
        shared=a["num_stages"] * depth * (rows * a[x].dtype.itemsize + products * cols * w.itemsize),
        flops=2 * rows * cols * products * steps * depth, unit=unit_of(w, precision=a.get("PRECISION", "ieee")),
        exponents=rows * cols if activation else 0.0,
        trips=max(1.0, steps / flying), tails=tails + 3 * (split > 1), operations=steps + (split > 1) + tails,
    )  # fmt: skip


def _cluster_residual(node: Node) -> Work:
    """Blocks of 64 x 64 outputs in clusters of eight that share K. Steps of 64 of it, some in flight; then each block's
    neighbours store their sums of an eighth of the rows with it. The residual is there by then."""
    a, stream = node.arguments, node.arguments["residual_ptr"].dtype.itemsize
    steps, rows = ceil(a["inputs"] / 64 / 8), a["rows"] / ceil(a["rows"] / 64)
    following, flying = 0 if a["next"][0] is None else 2, a["stages"]
    return Work(
        programs=prod(node.grid), warps=8, registers=64 if flying < 4 else 80,
        shared=128 + flying * 2 * 64 * 64 * 2 + 64 * 64 * 4,
        moved=2 * 64 * steps * (rows + 64) + rows / 8 * 64 * (2 * stream + following),
        flops=2 * 64 * 64 * 64 * steps, unit="bf16", trips=max(1.0, steps / flying), operations=steps,
        exchanges=1, exchanged=rows * 64 * 4 * 7 / 8, cluster=8,
    )  # fmt: skip


def _normed_products(node: Node) -> Work:
    """All weights of a block, then x, of which a cluster's blocks bring a part each for all; the shares of K meet in shared
    memory. Copies are waited for once, as they come one behind the other. The last barrier of the cluster costs nothing: all
    have arrived by then."""
    a = node.arguments
    k, cols, rows = a["inputs"], 2 * a["pairs"], a["rows"] / ceil(a["rows"] / 64)
    return Work(
        programs=prod(node.grid), warps=8, registers=64 if a["rows"] <= 64 else 80, shared=(cols + rows) * (2 * k + 16),
        moved=2 * k * (cols + rows) + 2 * rows * cols, flops=2 * 64 * cols * k, unit="bf16",
        exponents=rows * a["pairs"] if node.name == "norm_swiglu_cuda" else 0.0, operations=ceil(k / 64) + 3,
        multicast=2 * k * rows, cluster=a["cluster"], meets=1,
    )  # fmt: skip


def _attention(node: Node, rows: int, keys: int, dim: int) -> Work:
    """Blocks of keys: two products, and between them a maximum and a sum over the program's threads."""
    a = node.arguments
    q, k, v = a["q_ptr"].dtype, a["k_ptr"].dtype, a["v_ptr"].dtype
    wide = torch.promote_types(q, k)
    block, blocks = a["BLOCK_KEYS"], ceil(keys / a["BLOCK_KEYS"])
    mask = rows / a.get("BLOCK_GROUP", a.get("GROUP", 1)) * keys if "mask_ptr" in a else 0
    return Work(
        programs=prod(node.grid), warps=a["num_warps"], registers=WIDE_REGISTERS,
        moved=2 * rows * dim * q.itemsize + keys * dim * (k.itemsize + v.itemsize) + mask,
        shared=a["num_stages"] * block * dim * (k.itemsize + v.itemsize),
        flops=4 * rows * blocks * block * dim, unit=unit_of(wide, v, precision=a["PRECISION"]),
        exponents=rows * blocks * block,
        trips=max(1.0, blocks / max(a["num_stages"] - 1, 1)), operations=4 * blocks,
    )  # fmt: skip


def _attention_residual(node: Node) -> Work:
    """Attention of a tile, then one product with a slice of the weight, whose parts meet as a split product's; the residual
    comes with the weight."""
    a = node.arguments
    tokens, steps, dim, weight = a["BLOCK_TOKENS"], a["COL_STEPS"], a["HEAD_DIM"], a["weight_ptr"].dtype
    cols = steps * a["BLOCK_COLS"]
    work = _attention(node, tokens * a["BLOCK_GROUP"], a["keys"], dim)
    inner = a["BLOCK_GROUP"] * a["BLOCK_DIM"]
    moved = a["GROUP"] * dim * (cols * weight.itemsize - tokens * a["q_ptr"].dtype.itemsize)
    moved += tokens * cols * (2 * 4 + 2 * a["y_ptr"].dtype.itemsize / a["KV_HEADS"])
    return replace(
        work, registers=ALL_REGISTERS, moved=work.moved + moved,
        shared=max(work.shared, inner * a["BLOCK_COLS"] * weight.itemsize),
        flops=work.flops + 2 * tokens * inner * cols,
        trips=work.trips + steps, tails=3, operations=work.operations + steps + 2,
    )  # fmt: skip


def _layer_norm(node: Node) -> Work:
    a = node.arguments
    offsets = [a["offset_ptr"], a["left_ptr"]][: a["OFFSETS"]]
    shared = sum(each.dtype.itemsize for each in (a["weight_ptr"], a["bias_ptr"], *offsets))
    each = min(a["BLOCK_ROWS"], a["rows"]) * (a["x_ptr"].dtype.itemsize + a["y_ptr"].dtype.itemsize) + shared
    return Work(prod(node.grid), a["width"] * each, a["num_warps"], tails=1, operations=2)


def _suffix_embed(node: Node) -> Work:
    """One turn, its second product behind its first; parts meet as in ``_gemm``."""
    a = node.arguments
    rows, cols, hidden, actions = (a[f"BLOCK_{name}"] for name in ("ROWS", "COLS", "HIDDEN", "ACTIONS"))
    split, out = a["SPLIT_K"], a["out_weight_ptr"].dtype
    moved = hidden * (actions * a["in_weight_ptr"].dtype.itemsize + cols * out.itemsize + 4)
    moved += rows * (actions + 2 * cols * (split > 1)) * 4 + rows * cols * (4 + 2 * a["HAS_NEXT"]) / split
    return Work(
        programs=prod(node.grid), warps=a["num_warps"], registers=a["maxnreg"] or WIDE_REGISTERS, moved=moved,
        shared=4 * hidden * cols, flops=2 * rows * hidden * (actions + cols),
        unit=unit_of(torch.float32, precision=a["PRECISION"]), exponents=rows * hidden, trips=1.0,
        tails=3 * (split > 1), operations=2 + (split > 1),
    )  # fmt: skip


def _euler_step(node: Node) -> Work:
    """Twice over the row, once for its statistic, and nothing is loaded in advance."""
    a = node.arguments
    width, actions, steps = a["width"], a["BLOCK_ACTIONS"], ceil(a["width"] / a["BLOCK_COLS"])
    moved = width * (2 * a["h_ptr"].dtype.itemsize + actions * a["out_weight_ptr"].dtype.itemsize + 2)
    return Work(prod(node.grid), moved + 12 * actions, a["num_warps"], flops=2 * actions * width,
                trips=2 * steps, tails=1, operations=2)  # fmt: skip


def elementwise(node: Node) -> Work:
    """Every number is read once and written once."""
    number = sum(each.bytes for each in node.operands)
    programs = prod(node.grid)
    if node.by_torch:
        most = max(each.bytes / each.dtype.itemsize for each in node.operands)
        programs = ceil(most / (THREADS * PER_THREAD))
    return Work(programs, number / programs, node.arguments.get("num_warps", THREADS // 32))


def _scan(node: Node) -> Work:
    """One row is a chain."""
    work = elementwise(node)
    return Work(1, work.moved * work.programs, operations=10)


def _library_products(node: Node) -> list[Work]:
    """A product by cuBLAS in each of its tiles, of which its heuristic is taken to find the cheapest. K is not split. Blocks
    of a cluster share an operand, the larger one where there is a choice: multicast brings it from L2 once for them."""
    found = [x for x in node.arguments.values() if isinstance(x, Operand)]
    out, (x, weight) = found[-1], found[-3:-1]
    inputs, outputs = x.shape[-1], out.shape[-1] if len(weight.shape) > 1 else 1
    rows, batch = prod(out.shape) // outputs, 1
    if node.name in ("bmm", "baddbmm"):
        rows, batch = out.shape[1], out.shape[0]
    if node.name == "mv":
        rows, outputs = 1, out.shape[0]
    works = []
    for tile_rows, tile_cols in LIBRARY_TILES:
        row_tiles, col_tiles = ceil(rows / tile_rows), ceil(outputs / tile_cols)
        tile = dict(BLOCK_M=tile_rows, BLOCK_N=tile_cols, BLOCK_K=64, num_warps=12, num_stages=4)
        given = dict(x=x, weight=weight, y_ptr=out, rows=rows, **tile)
        as_ours = Node(node.stage, node.layer, node.name, (row_tiles * col_tiles * batch,), given)
        activation = "activation" in node.name
        work = _gemm(as_ours, "x", "weight", inputs, tails=len(found) > 3, activation=activation)
        of_x = min(rows, tile_rows) * x.dtype.itemsize * (col_tiles > 1)
        of_weight = tile_cols * weight.dtype.itemsize * (row_tiles > 1)
        works.append(replace(work, library=True, multicast=inputs * max(of_x, of_weight)))
    return works


def _library_attention(node: Node) -> Work:
    """In tiles of 128 rows and 128 keys. On Hopper cuDNN overlaps products and exponents as FlashAttention-3 does, and
    FlashAttention-2, which torch brings, does not (arXiv 2407.08608)."""
    q, k = node.arguments["0"], node.arguments["1"]
    tile = dict(BLOCK_KEYS=128, num_warps=8, num_stages=2, PRECISION="ieee")
    given = dict(q_ptr=q, k_ptr=k, v_ptr=node.arguments["2"], **tile)
    as_ours = Node(node.stage, "", node.name, (ceil(q.shape[2] / 128), q.shape[0] * q.shape[1]), given)
    work = _attention(as_ours, 128, k.shape[2], q.shape[3])
    return replace(work, library=True, overlapped="cudnn" in node.name)


RULES: dict[str, Rule] = {
    "linear_fwd": lambda n: _gemm(n, "x_ptr", "weight_ptr", n.arguments["inputs"], tails=1.0,
                                  activation=bool(n.arguments["ACTIVATION"])),
    "linear_residual_fwd": lambda n: _gemm(n, "x_ptr", "weight_ptr", n.arguments["inputs"], tails=1.0),
    "linear_residual_cuda": _cluster_residual,
    "norm_swiglu_cuda": _normed_products,
    "norm_qkv_rope_cuda": _normed_products,
    "norm_swiglu_fwd": lambda n: _gemm(n, "x_ptr", "gate_weight_ptr", n.arguments["inputs"], products=2, activation=True),
    "norm_qkv_rope_fwd": lambda n: _gemm(n, "x_ptr", "q_weight_ptr", n.arguments["inputs"], products=2, tails=1.0),
    "cross_kv_fwd": lambda n: _gemm(n, "k_ptr", "k_weight_ptr", n.arguments["width"]),
    "pixel_shuffle_linear_fwd": lambda n: _gemm(n, "x_ptr", "weight_ptr", n.arguments["inputs"]),
    "patch_embed_fwd": lambda n: _gemm(n, "pixels_ptr", "weight_ptr", prod(n.arguments["weight_ptr"].shape[1:]), tails=2.0),
    "attention_fwd": lambda n: _attention(n, n.arguments["BLOCK_ROWS"], n.arguments["tokens"], n.arguments["HEAD_DIM"]),
    "masked_attention_fwd": lambda n: _attention(
        n, n.arguments["BLOCK_ROWS"], n.arguments["keys"], n.arguments["HEAD_DIM"]
    ),
    "attention_residual_fwd": _attention_residual,
    "layer_norm_fwd": _layer_norm,
    "suffix_embed_fwd": _suffix_embed,
    "euler_step_fwd": _euler_step,
}  # fmt: skip
"""Of our kernels; one that has none is small."""
PRODUCTS_BY_TORCH = ("mm", "mv", "bmm", "addmm", "addmv", "baddbmm", "_addmm_activation")
BY_TORCH: dict[str, Rule] = {
    **dict.fromkeys(
        ("_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention"), _library_attention
    ),
    **dict.fromkeys(("cumsum", "sum"), _scan),
}
"""Of ATen's other calls that are not elementwise."""


def is_small(node: Node) -> bool:
    """Whether a node is one of those that prepare what the layers and steps need: no layer's, and no large product."""
    return not node.layer and (node.by_torch or node.name not in RULES)


def works_of(node: Node) -> list[Work]:
    """One, or of a library's product one for each tile that it may take. Raises KeyError of a layer's Triton kernel that has
    no rule."""
    if node.by_torch:
        if node.name in PRODUCTS_BY_TORCH:
            return _library_products(node)
        return [BY_TORCH.get(node.name, elementwise)(node)]
    if node.layer and node.name not in RULES:
        raise KeyError(
            f"{node.name} has no rule; say in benchmarks/gpu_account/work.py what a program of it does"
        )
    return [RULES.get(node.name, elementwise)(node)]
