"""`make gpu-account`: the page is what the code launches; a price follows from a node's work and the constants."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

from smolvla_fast.kernels.linear import _linear_fwd

if not isinstance(_linear_fwd, JITFunction):
    pytest.skip("kernels are interpreted here: they have no launch to note", allow_module_level=True)

from benchmarks.gpu_account.__main__ import PAGE
from benchmarks.gpu_account.page import Account, counts, markdown, of_result
from benchmarks.gpu_account.price import H100, L2, Priced, price, price_node, total
from benchmarks.gpu_account.recording import AROUND, Node, Operand, record
from benchmarks.gpu_account.work import Work, works_of

MADE_BY = f"with torch {torch.__version__.partition('+')[0]},"


@pytest.fixture(scope="module")
def account() -> Account:
    """At full size: nothing is computed, so it takes seconds and no memory."""
    return Account(H100, record())


def test_the_page_is_what_the_code_launches(account: Account) -> None:
    if MADE_BY not in PAGE.read_text():
        pytest.skip("the page was made with another torch, whose calls may be other ones")
    assert markdown(account).splitlines() == PAGE.read_text().splitlines(), (
        "run `make gpu-account` and commit"
    )


def test_a_launch_more_is_on_the_page(account: Account) -> None:
    nodes = account.recording.nodes
    more = replace(account.recording, nodes=[*nodes, nodes[0]])
    assert counts(Account(H100, more)) not in PAGE.read_text()
    assert MADE_BY not in PAGE.read_text() or counts(account) in PAGE.read_text()


def test_a_chunk_has_its_parts(account: Account) -> None:
    """Of the recording what does not depend on how few launches there are."""
    stages = {node.stage.partition(" ")[0] for node in account.recording.nodes}
    assert stages == {"vision", "prefix", "denoise", AROUND.partition(" ")[0]}
    assert account.recording.expert_layers == {"self": 8, "cross": 8} and account.recording.steps == 10
    weights = {x.place: x.bytes for node in account.recording.nodes for x in node.operands if x.weight}
    cost = account.recording.costs
    read = sum(cost[stage].bytes for stage in ("vision", "prefix"))
    assert sum(weights.values()) > read, "weights that a chunk needs are not among the operands"
    hbm = sum(each.hbm for each in account.priced if each.node.stage == "denoise")
    # At most the floor's bytes of a step are weights; keys, values and the heads' fp32 come beside them.
    assert 0.9 < hbm / cost["denoise"].bytes < 1.6


def test_a_denoise_step_reads_prepared_rows_alone(account: Account) -> None:
    """Of its first layer as well, whose rows ``suffix_embed`` prepares."""
    normed = ("norm_qkv_rope", "norm_swiglu")
    norms = [
        node for node in account.recording.nodes if node.stage == "denoise" and node.name.startswith(normed)
    ]
    assert len(norms) >= 2 * 16 * 9
    # Kernels of CUDA C++ take no others.
    assert all("cuda" in node.name or node.arguments["PREPARED"] for node in norms)


def test_nothing_is_left_behind(account: Account) -> None:
    from smolvla_fast import inference
    from smolvla_fast.engine import timing

    assert inference.section is timing.section and torch.ones(1).device.type == "cpu"
    assert torch.nn.Linear(2, 2).to(torch.float64).weight.dtype is torch.float64


WORK = Work(programs=132, moved=1000.0)


def operand(size: int, place: int = 0, weight: bool = True) -> Operand:
    return Operand((place, 0), (size,), torch.uint8, size, weight)


def node(pdl: bool = False, **arguments: Any) -> Node:
    return Node("denoise", "self", "k", (132,), arguments, pdl)


def us(
    work: Work, weights: float = 0.0, gpu: Any = H100, before: Priced | None = None, pdl: bool = False
) -> float:
    return price_node(gpu, node(pdl), work, weights, weights, before).seconds * 1e6


def test_a_node_bound_by_hbm_costs_its_bytes() -> None:
    more = us(WORK, 6e9) - us(WORK, 3e9)
    assert more == pytest.approx(3e9 / (0.9 * 3.35e12) * 1e6)
    half = replace(H100, hbm=H100.hbm._replace(value=H100.hbm.value / 2))
    assert us(WORK, 6e9, half) - us(WORK, 3e9, half) == pytest.approx(2 * more)


def test_a_node_bound_by_products_costs_its_flop() -> None:
    product = replace(WORK, flops=1e9, unit="bf16")
    more = us(replace(product, flops=2e9)) - us(product)
    assert more == pytest.approx(132e9 / (989e12 * H100.tensor_share.value) * 1e6)
    for slower in (replace(product, unit="tf32x3"), replace(product, unit="fma")):
        assert us(slower) > us(product)


def test_a_program_more_than_fit_is_a_wave_more() -> None:
    alone = replace(WORK, shared=200 * 1024, trips=10.0)
    assert us(replace(alone, programs=133)) > 1.5 * us(alone)
    assert us(replace(alone, programs=133, shared=0)) < 1.1 * us(alone)


@pytest.mark.parametrize("name", H100.constants)
def test_every_constant_has_a_source_and_a_say(account: Account, name: str) -> None:
    """A wrong constant is seen: a tenth of it moves the price of this chunk with some nodes by dependent launch."""
    constant = H100.constants[name]
    assert constant.source and constant.value > 0
    nodes = [replace(each, pdl=place % 5 < 2) for place, each in enumerate(account.recording.nodes)]
    product = {
        str(place): Operand((-place, 0), (2048, 2048), torch.bfloat16, 2**23, True) for place in range(3)
    }
    nodes += [Node("vision", "vision", "mm", (), product)] * 8  # what they read is in L2 the second time
    other = replace(H100, **{name: constant._replace(value=constant.value / 10)})
    # Beside them what no node of the chunk is: just as large as fits, on FMA units for the most part.
    rare = [
        *[replace(WORK, programs=264, shared=100 * 1024, trips=10.0)] * 1000,
        replace(WORK, flops=1e7),
        replace(WORK, exchanges=1e4, exchanged=1e6),
    ]
    found, wrong = (
        sum(each.seconds for each in price(gpu, nodes)) + sum(us(each, gpu=gpu) for each in rare) * 1e-6
        for gpu in (H100, other)
    )
    assert found != pytest.approx(wrong, rel=1e-3)  # the sums differ by more than their rounding


def test_sums_of_a_cluster_are_priced(account: Account) -> None:
    """Of the chunk and its prefix; what a cluster exchanges is part of the wait."""
    nodes = [node for node in account.recording.nodes if node.name == "linear_residual_cuda"]
    of_loop = [node for node in nodes if node.stage == "denoise" and node.arguments["inputs"] == 2048]
    assert len(of_loop) > 140 and all(node.arguments["rows"] == 50 and node.pdl for node in of_loop)
    (cluster,) = works_of(of_loop[0])
    assert cluster.programs == 96
    waiting = replace(cluster, trips=50.0)
    assert us(replace(waiting, exchanges=11)) - us(waiting) == pytest.approx(10 * 380 / 1755)
    assert us(replace(waiting, exchanged=waiting.exchanged + 14e3)) - us(waiting) == pytest.approx(1e3 / 1755)


def test_normed_products_are_priced(account: Account) -> None:
    """What a cluster shares comes once from L2, and its first barrier is ahead of the first load."""
    nodes = [node for node in account.recording.nodes if node.name == "norm_swiglu_cuda"]
    (alone,) = works_of(next(node for node in nodes if node.arguments["rows"] == 50))
    assert (alone.programs, alone.cluster, alone.meets) == (128, 8, 1)
    assert alone.multicast == 2 * 720 * 50
    moved = us(replace(alone, cluster=1)) - us(replace(alone, cluster=2))
    assert moved == pytest.approx(128 * alone.multicast / 2 / H100.l2.value * 1e6)
    waiting = replace(alone, trips=50.0)
    assert us(replace(waiting, meets=11)) - us(waiting) == pytest.approx(10 * 380 / 1755)
    assert us(replace(waiting, programs=129)) > 1.9 * us(
        waiting
    )  # 16 clusters fit, though 132 programs would


def test_dependent_launch_hides_what_reads_weights_alone() -> None:
    before = price_node(H100, node(pdl=True), replace(WORK, trips=20.0), 0.0, 0.0, None)
    assert before.idle > 2e-6
    behind = us(WORK, 3e6, before=before, pdl=True)
    without = us(WORK, 3e6, before=before)
    assert behind < without - 0.7  # the gap alone
    # Not more than HBM could bring while the node before it did not use it.
    busy = replace(before, idle=0.0)
    assert behind < us(WORK, 3e6, before=busy, pdl=True) < without - 0.7
    # A node that does not let the next one begin, or leaves it no place, hides nothing; the latter but the gap.
    plain = replace(before, node=node())
    assert us(WORK, 3e6, before=plain, pdl=True) == without
    full = replace(before, work=replace(before.work, shared=200 * 1024))
    crowded = replace(WORK, shared=100 * 1024)
    assert us(crowded, 3e6, before=full, pdl=True) == pytest.approx(without - 0.7)


def test_l2_holds_what_was_touched_last() -> None:
    l2 = L2(100.0)
    assert l2.missing([operand(60, 1)]) == (60.0, 60.0)
    assert l2.missing([operand(60, 1)]) == (0.0, 0.0)
    assert l2.missing([operand(30, 2, weight=False)]) == (0.0, 0.0), "what a node writes is not read first"
    assert l2.missing([operand(60, 3)]) == (60.0, 60.0)
    assert l2.missing([operand(60, 1)]) == (60.0, 60.0), "gone, as the longest untouched"
    assert l2.missing([operand(30, 2, weight=False)]) == (0.0, 30.0), "written, and gone meanwhile"


def test_a_stage_beside_another_counts_as_far_as_it_is_longer() -> None:
    assert total({"vision": 1.0, "prefix": 2.0, "denoise beside prefix": 1.5}) == 3.0
    assert total({"vision": 1.0, "prefix": 2.0, "denoise beside prefix": 2.5}) == 3.5


def test_a_branch_is_priced_behind_its_own_nodes() -> None:
    """What stands between two nodes in the order of launches, and runs beside them, changes nothing for them."""
    main = [replace(node(pdl=True, x=operand(132 * 1000, place)), layer="") for place in range(2)]
    side = replace(main[0], stage="denoise beside prefix", pdl=False, arguments={"x": operand(132000, 3)})
    alone, found = price(H100, main), price(H100, [main[0], side, main[1]])
    assert [found[0].seconds, found[2].seconds] == [each.seconds for each in alone]
    assert found[2].seconds < price(H100, [side, main[1]])[1].seconds, "programs of it start before it"


def test_a_library_is_priced_by_its_own_share() -> None:
    product = replace(WORK, flops=1e9, unit="bf16")
    assert us(replace(product, library=True)) < us(product)


def test_exponents_beside_products_cost_the_longer_of_both() -> None:
    attention = replace(WORK, flops=1e8, exponents=4e5, unit="bf16")
    products, exponents = us(replace(attention, exponents=0.0)), us(replace(attention, flops=0.0))
    assert us(replace(attention, overlapped=True)) == pytest.approx(max(products, exponents))
    assert us(attention) > 1.2 * max(products, exponents)


def test_what_a_cluster_shares_comes_from_l2_once_and_over_each_port() -> None:
    wide = replace(WORK, moved=1e6, cluster=2)
    assert us(wide) - us(replace(wide, multicast=5e5)) == pytest.approx(132 * 2.5e5 / 5.5e12 * 1e6)
    narrow = replace(H100, port=H100.port._replace(value=1.0))
    assert us(wide, gpu=narrow) == us(replace(wide, multicast=5e5), gpu=narrow)


def test_a_librarys_product_has_the_cheapest_of_its_tiles() -> None:
    def shaped(*shape: int) -> Operand:
        return Operand((len(shape), shape[-1]), shape, torch.bfloat16, 2, True)

    def product(rows: int, outputs: int) -> Node:
        given = {"0": shaped(rows, 768), "1": shaped(768, outputs), "2": shaped(rows, outputs)}
        return Node("vision", "vision", "mm", (), given)

    found = {}
    for rows, outputs in ((2048, 768), (2048, 3072)):
        each = product(rows, outputs)
        seconds = {
            work.programs: price_node(H100, each, work, 0.0, 0.0, None).seconds for work in works_of(each)
        }
        (priced,) = price(H100, [each])
        assert priced.seconds == min(seconds.values()) < max(seconds.values())
        found[outputs] = priced.work.programs
    assert found == {768: 96, 3072: 192}, "128 x 128 and 128 x 256"
    # One row of blocks has no two that share a weight: it is x that they share, of which there is one row.
    assert {work.multicast for work in works_of(product(1, 3072))} == {768 * 2}


def test_a_kernel_of_a_layer_without_a_rule_is_an_error() -> None:
    with pytest.raises(KeyError, match="k has no rule; say in benchmarks/gpu_account/work.py"):
        works_of(node())
    small = replace(node(x=operand(1320)), layer="")
    assert [work.moved for work in works_of(small)] == [10.0]


def test_what_was_measured_is_read_from_a_result() -> None:
    h100: dict[str, Any] = {"machine_info": {"smolvla_fast": {"gpus": [{"name": "NVIDIA H100 80GB HBM3"}]}}}
    stages = {stage: {"p50_ms": 1.0} for stage in ("vision", "prefix", "denoise", "total")}
    info = dict(suite="stages", variant="bf16", cameras=2, stages=stages)
    bench = {"group": "stages: full size, cuda, bf16 weights", "extra_info": info}
    assert of_result({**h100, "benchmarks": [bench]}) == dict.fromkeys(stages, 1.0)
    assert of_result({**h100, "benchmarks": [{**bench, "extra_info": {**info, "variant": "fp32"}}]}) == {}
    assert of_result({"machine_info": {}, "benchmarks": [bench]}) == {}, "of another machine"
    parts = [
        {"name": "stages", "figures": {"vision_ms": 1.5}},
        {"name": "policy", "figures": {"headline": {"ms": 3.0}}},
    ]
    assert of_result({**h100, "parts": parts}) == {"vision": 1.5, "total": 3.0}
    assert of_result({**h100, "parts": parts, "rehearsal": True}) == {}
