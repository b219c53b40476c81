"""``smolvla-fast bench --suite train``: what it times, and what it writes beside each time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

pytest.importorskip("pytest_benchmark")
pytest.importorskip("lerobot.policies.smolvla.modeling_smolvla")

import smolvla_fast
from benchmarks.harness.gate import CheckFailed
from benchmarks.harness.roof import Ceilings, training_costs
from benchmarks.harness.setup import BenchmarkSetup
from benchmarks.suites import train as train_step
from smolvla_fast.loss.image_cache import ImageCache
from smolvla_fast.model.weights import is_cross
from smolvla_fast.stages.observation import LANGUAGE_MULTIPLE

pytestmark = pytest.mark.training
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
@pytest.mark.slow
def test_the_suite_writes_its_figures(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    command = [sys.executable, "-m", "smolvla_fast.cli", "bench", "--suite", "train", "--size", "tiny"]
    command += ["--device", "cpu", "--threads", "1", "--rounds", "1", "--batch", "1", "--json", str(path)]
    done = subprocess.run(
        command, cwd=ROOT, text=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    suites: dict[str, Any] = {"train": {}, "trainer": {}}
    for each in json.loads(path.read_text())["benchmarks"]:
        suites[each["extra_info"]["suite"]][each["extra_info"]["variant"]] = each["extra_info"]
    found, runs = suites["train"], suites["trainer"]
    assert set(runs) == set(train_step.TRAINERS)
    for each in runs.values():
        assert each["gradient_rel_l2"] <= train_step.GRADIENT_BOUND and each["frames"] > 40
        data, update = (each["stages"][part]["p50_ms"] for part in ("data", "update"))
        assert data > 0 < update and data + update <= each["p50_ms"]
    assert set(found) == set(train_step.VARIANTS) - {train_step.COMPILED}
    assert all(each["gradient_rel_l2"] <= each["bound"] and each["p50_ms"] > 0 for each in found.values())
    for name, each in found.items():
        base = found[train_step.STOCK[name.endswith("bf16")]]
        assert each["rounds"] == 1 and each["ratio"] == pytest.approx(base["p50_ms"] / each["p50_ms"])
    assert found["patched"]["bound"] == train_step.GRADIENT_BOUND
    known = {name: each["frames_known"] for name, each in found.items() if "frames_known" in each}
    all_known = dict.fromkeys((train_step.CACHED, train_step.FUSED), train_step.CAMERAS)
    assert known == {**all_known, train_step.NEW: 0}
    assert {name for name, each in found.items() if each["fused"]} == {train_step.FUSED}
    for each in found.values():
        assert 0 < each["floor_ms"] < each["p50_ms"]
        assert each["share_of_floor"] == pytest.approx(each["floor_ms"] / each["p50_ms"])
    assert (
        found[train_step.CACHED]["floor_ms"] < found[train_step.NEW]["floor_ms"] == found["stock"]["floor_ms"]
    )
    report = path.with_suffix(".md").read_text()
    assert (
        "| data ms | update ms |" in report
        and "## Training step" in report
        and train_step.CACHED in report
        and "| of the roof |" in report
    )


@pytest.fixture
def trainee() -> Any:
    """trainee(variant, size=1): a twin that was made ready."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    setup = BenchmarkSetup(torch.device("cpu"), Ceilings({"float32": 1e12}, 1e10), size="tiny")
    cases: dict[int, Any] = {}

    def make(variant: str, size: int = 1) -> Any:
        case = cases.setdefault(size, train_step.TrainCase(setup, size))
        return train_step.Trainee(case, variant).prepare()

    yield make
    torch.set_num_threads(before)


class _Products(TorchDispatchMode):
    """Counts the operations of matrix products, attention's among them: by torch's formulas, where torch has one."""

    total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, op = func(*args, **(kwargs or {})), func._overloadpacket
        if op in flop_registry:
            self.total += flop_registry[op](*args, **(kwargs or {}), out_val=out)
        elif "flash_attention_for_cpu" in str(op):
            backward = "backward" in str(op)
            q, k = args[backward : 2 + backward]
            self.total += 4 * q.numel() * k.shape[2] * (1 + backward)
        elif "_linear_pointwise" in str(op):
            self.total += 2 * args[0].numel() * args[1 + (func._overloadname == "binary")].shape[0]
        return out


@pytest.mark.parametrize("size", [1, 2])
def test_the_floor_of_a_step_is_just_below_what_ours_does(trainee: Any, size: int) -> None:
    """With the padding of language that ours computes. What is left, 2.4 % at this size, are gradients of frozen rows of
    keys and values, which attention's backward makes beside those of rows that learn, and the state's own attention."""
    ours = trainee("patched", size)
    smolvla_fast.patch(ours.policy, training=True, backend="torch")
    with _Products() as products:
        ours.step()
    assert smolvla_fast.status(ours.policy).training_fast == 1
    tokens = int(ours.case.batch["observation.language.attention_mask"].any(dim=0).sum())
    padded = -(-tokens // LANGUAGE_MULTIPLE) * LANGUAGE_MULTIPLE
    costs = training_costs(ours.policy.model, train_step.CAMERAS, padded, 4, size)
    assert 1 <= products.total / sum(cost.flops for cost in costs.values()) < 1.03


def test_the_traffic_of_a_step_is_that_of_what_learns(trainee: Any) -> None:
    """AdamW reads four numbers a weight and writes three; the expert's own weights are read forward and backward, here in
    two bytes. Projections of the prefix and of the state are the prefix's."""
    stock = trainee("stock")
    stock.step()
    learn = {
        name: each.numel()
        for name, each in stock.policy.named_parameters()
        if each.grad is not None and each.dim() == 2
    }
    pair = stock.policy.model.vlm_with_expert
    crosses = [i for i in range(len(pair.lm_expert.layers)) if is_cross(pair, i)]
    of_prefix = ["state_proj", *(f"layers.{i}.self_attn.{x}_proj" for i in crosses for x in "kv")]
    own = {name: size for name, size in learn.items() if not any(part in name for part in of_prefix)}
    assert len(learn) - len(own) == len(of_prefix)
    cost = training_costs(stock.policy.model, train_step.CAMERAS, language=9, itemsize=2)["expert"]
    assert cost.bytes == 7 * 4 * sum(learn.values()) + 2 * 2 * sum(own.values())


def test_one_set_of_moments_serves_both_optimizers(trainee: Any) -> None:
    """Or a GPU's peak would be that of the variants before it, too."""
    stock, fused = trainee("stock"), trainee(train_step.FUSED)
    stock.step()
    moments = [state["exp_avg"] for state in stock.case.optimizer.state.values()]
    fused.step()
    fast, plain = (each.optimizer.param_groups[0]["fused"] for each in (fused, stock))
    assert fast and not plain and len(moments) > 20
    shared = [state["exp_avg"] for state in stock.case.fused().state.values()]
    assert all(a is b for a, b in zip(moments, shared, strict=True))


def test_stock_is_held_to_other_code(trainee: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trainee("stock").check()["gradient_rel_l2"] <= 1e-4
    other = trainee("stock", 2)
    loss = other.case.loss
    monkeypatch.setattr(
        other.case, "loss", lambda policy, bf16: loss(policy, bf16) * (1.1 if policy is other.policy else 1)
    )
    truth = other.case.truth
    monkeypatch.setattr(other.case, "truth", lambda name: other.found() if name == "stock" else truth(name))
    with pytest.raises(CheckFailed, match="gradients are 0.1 from stock's in fp32, allowed 0.0001"):
        other.check()


def test_a_step_with_other_gradients_is_red(trainee: Any) -> None:
    ours = trainee("patched")
    ours.check()
    ours.policy.model.action_in_proj.weight.data.mul_(1.001)
    with pytest.raises(CheckFailed, match="gradients are .* from stock's in fp32, allowed 1e-05"):
        ours.check()


def test_a_frame_that_is_known_with_other_tokens_is_red(
    trainee: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is timed is a step that finds its frames; so that is what is checked, not the step that first encodes them."""
    encoded = ImageCache.encoded

    def twice_when_known(self: ImageCache, *given: Any) -> torch.Tensor:
        missed = self.misses
        tokens = encoded(self, *given)
        return tokens if self.misses > missed else 2 * tokens

    monkeypatch.setattr(ImageCache, "encoded", twice_when_known)
    with pytest.raises(CheckFailed, match="gradients are"):
        trainee(train_step.CACHED).check()


@pytest.mark.parametrize(
    ("variant", "bytes_", "known"), [(train_step.CACHED, 1, 0), (train_step.NEW, 2**28, 2)]
)
def test_a_cache_that_knows_other_frames_is_red(trainee: Any, variant: str, bytes_: int, known: int) -> None:
    ours = trainee(variant)
    smolvla_fast.patch(ours.policy, training=True, image_cache=bytes_)
    with pytest.raises(CheckFailed, match=f"{known} of 2 frames were known"):
        ours.check()


def test_the_documented_figures_are_of_the_committed_run() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    [report] = re.findall(r"\(\.\./(benchmarks/results/[^)]*-train-[^)]*)\.md\)", text)
    data = json.loads((ROOT / f"{report}.json").read_text(encoding="utf-8"))
    found = {
        (each["extra_info"]["variant"], each["extra_info"]["batch"]): each["extra_info"]
        for each in data["benchmarks"]
    }
    rows = re.findall(r"^\| (stock|patched[^|]*?) \| (\d.*) \|$", text, re.MULTILINE)
    assert {name.replace("`image_cache`, ", "") for name, _ in rows} == {variant for variant, _ in found}
    for name, cells in rows:
        figures = cells.split(" | ")
        for batch, (p50, ratio, share, error) in zip((1, 2), (figures[:4], figures[4:]), strict=True):
            each = found[name.replace("`image_cache`, ", ""), batch]
            assert float(p50.replace(",", "")) == round(each["p50_ms"])
            assert float(ratio.rstrip("x")) == pytest.approx(each["ratio"], abs=0.005)
            assert float(share.rstrip(" %")) == round(100 * each["share_of_floor"])
            assert float(error) == pytest.approx(each["gradient_rel_l2"], rel=0.05)
    least, most = found["stock", 1]["floor_ms"], found["stock", 1]["p50_ms"]
    assert f"is {least / 1e3:.2f} s a sample" in text
    assert f"at most {most / least:.2f}x on stock's {most / 1e3:.2f} s" in text
    assert found["stock", 2]["floor_ms"] == pytest.approx(2 * least, rel=0.01)  # a sample


def test_the_documented_steps_of_a_run_are_of_the_committed_run() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    [report] = re.findall(r"\(\.\./(benchmarks/results/[^)]*-trainer-[^)]*)\.md\)", text)
    data = json.loads((ROOT / f"{report}.json").read_text(encoding="utf-8"))
    found = {each["extra_info"]["variant"]: each["extra_info"] for each in data["benchmarks"]}
    shown = {"LeRobot": "LeRobot", "ours": "train", "ours, frames known": "train, frames known"}
    rows = re.findall(
        r"^\| (LeRobot|ours[^|]*?) \| ([\d.]+) \| ([\d,]+) \(.*?\) \| ([\d.]+)x \| (\S+) \| ",
        text,
        re.MULTILINE,
    )
    assert {shown[name] for name, *_ in rows} == found.keys()
    for name, data_ms, update_ms, ratio, error in rows:
        each = found[shown[name]]
        stages = each["stages"]
        assert float(data_ms) == pytest.approx(stages["data"]["p50_ms"], rel=0.01)
        assert float(update_ms.replace(",", "")) == round(stages["update"]["p50_ms"])
        assert float(ratio) == pytest.approx(each["ratio"], abs=0.005)
        assert float(error) == pytest.approx(each["gradient_rel_l2"], rel=0.05)


def test_stock_in_the_place_of_ours_is_red(trainee: Any) -> None:
    ours = trainee("patched")
    ours.policy.model.action_out_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(CheckFailed, match="stock ran in its place: .*forward hook"):
        ours.check()
