"""The made policies and observations: the right size and dtypes, and every input matters to the chunk."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lerobot.policies.smolvla.modeling_smolvla", reason="the policies are LeRobot's")

from support.copies import Original

from smolvla_fast.testing.policies import make_noise, make_observation, make_policy

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def policy() -> Any:
    return make_policy("tiny")


def chunk(policy: Any, observation: dict[str, torch.Tensor], noise: torch.Tensor) -> torch.Tensor:
    return policy.predict_action_chunk(dict(observation), noise=noise.clone())


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x - y).norm() / y.norm()).item()


def assert_every_input_matters(policy: Any) -> None:
    observation, noise = make_observation(policy), make_noise(policy)
    other = make_observation(policy, seed=1, task="open the drawer")
    want = chunk(policy, observation, noise)
    parts = [[key] for key in observation if "language" not in key]
    parts.append([key for key in observation if "language" in key])
    for keys in parts:
        changed = {**observation, **{key: other[key] for key in keys}}
        # 1e-3 is the point from which a wrong mask or scale in that part cannot hide in fp32 rounding (1e-6).
        assert relative(chunk(policy, changed, noise), want) > 1e-3, f"{keys} hardly matter"
    assert relative(chunk(policy, observation, make_noise(policy, seed=1)), want) > 1e-3


@pytest.mark.parametrize("origin", ["lerobot", "ours"])
def test_constructors_draw_no_random_numbers(monkeypatch: pytest.MonkeyPatch, origin: str) -> None:
    """All of them are overwritten, and of a full-size policy they take seconds."""
    monkeypatch.setattr(torch.random, "fork_rng", lambda **_: contextlib.nullcontext())
    before = torch.get_rng_state()
    make_policy("tiny", origin=origin)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_input_matters(policy: Any) -> None:
    assert_every_input_matters(policy)


def test_padding_of_the_language_does_not_matter(policy: Any) -> None:
    noise = make_noise(policy)
    short, long = (chunk(policy, make_observation(policy, language_length=n), noise) for n in (30, 60))
    # Masked keys get probability 0; only the order of sums differs.
    assert relative(long, short) < 1e-5


def test_attention_is_far_from_uniform(policy: Any) -> None:
    """Uniform attention would hide a wrong scale or rotation: sharing of keys must depend on the query."""
    pair = policy.model.vlm_with_expert
    spread: list[float] = []
    stock = pair.eager_attention_forward

    def watched(
        mask: Any, batch: Any, head_dim: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> Any:
        keys = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        scores = torch.einsum("bthd,bshd->bhts", q, keys) * head_dim**-0.5
        probs = scores.masked_fill(~mask[:, None], -1e30).softmax(-1)
        entropy = -(probs * probs.clamp_min(1e-30).log()).sum(-1)
        share = entropy.exp() / mask.sum(-1)[:, None]
        spread.append(share[share.isfinite()].mean().item())  # padded queries see no key
        return stock(mask, batch, head_dim, q, k, v)

    pair.__dict__["eager_attention_forward"] = watched
    try:
        chunk(policy, make_observation(policy), make_noise(policy))
    finally:
        del pair.__dict__["eager_attention_forward"]
    assert len(spread) > 8
    # 1 is uniform over the visible keys, 1/keys is a single one.
    assert max(spread) < 0.95 and min(spread) > 0.02


def test_same_seed_same_policy_and_random_state_untouched() -> None:
    before = torch.get_rng_state()
    first, again, other = make_policy("tiny"), make_policy("tiny"), make_policy("tiny", seed=1)
    make_noise(first), make_observation(first)
    assert torch.equal(torch.get_rng_state(), before)
    for (name, x), y, z in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(x, y), name
        assert not torch.equal(x, z), name
        assert x.isfinite().all(), name


@pytest.mark.parametrize("origin", ["lerobot", "ours"])
def test_copies_of_the_tests_are_deep_copies(origin: str) -> None:
    """support.copies: the same bits, types and sharing of memory, and none of it the original's."""
    policy = make_policy("tiny", origin=origin, layout="mixed")
    found, wanted = Original(policy).copy(), copy.deepcopy(policy)
    assert type(found) is type(wanted) and found.config == wanted.config and found.config is not policy.config
    mine, theirs, first = (dict(each.state_dict(keep_vars=True)) for each in (found, wanted, policy))
    assert [*mine] == [*theirs]
    for name, tensor in mine.items():
        other = theirs[name]
        assert torch.equal(tensor, other) and type(tensor) is type(other), name
        assert (tensor.dtype, tensor.requires_grad) == (other.dtype, other.requires_grad), name
        assert tensor.data_ptr() != first[name].data_ptr(), name

    def shared(tensors: dict[str, torch.Tensor]) -> list[list[str]]:
        return [[b for b in tensors if tensors[a].data_ptr() == tensors[b].data_ptr()] for a in tensors]

    assert shared(mine) == shared(theirs)


def test_layouts_set_dtypes() -> None:
    mixed = make_policy("tiny", layout="mixed").model
    pair = mixed.vlm_with_expert
    cross, own = pair.lm_expert.layers[1].self_attn, pair.lm_expert.layers[0].self_attn
    for module, dtype in [
        (pair.vlm, BF16),
        (own, BF16),
        (cross.q_proj, BF16),
        (cross.o_proj, BF16),
        (cross.k_proj, FP32),
        (cross.v_proj, FP32),
        (mixed.state_proj, FP32),
        (mixed.action_in_proj, FP32),
        (mixed.action_out_proj, FP32),
        (mixed.action_time_mlp_in, FP32),
        (mixed.action_time_mlp_out, FP32),
    ]:
        assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    text = make_policy("tiny", layout="bf16_text").model.vlm_with_expert.vlm
    assert {p.dtype for p in text.model.text_model.parameters()} == {BF16}
    assert {p.dtype for m in (text.model.vision_model, text.model.connector) for p in m.parameters()} == {
        FP32
    }
    assert {p.dtype for p in make_policy("tiny", layout="bf16").parameters()} == {BF16}


@pytest.mark.parametrize("layout", ["fp32", "mixed", "bf16_text"])
def test_stock_runs_every_layout_it_can(layout: str) -> None:
    policy = make_policy("tiny", layout=layout)
    result = chunk(policy, make_observation(policy, batch=2), make_noise(policy, batch=2))
    assert result.shape == (2, 10, 6) and result.isfinite().all()


def test_sizes_and_configuration_can_be_changed() -> None:
    policy = make_policy(
        "tiny", cameras=1, state_dim=8, action_dim=7,
        text={"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64},
        vision={"hidden_size": 48, "num_attention_heads": 3, "image_size": 48}, num_steps=3, chunk_size=5,
        expert_width_multiplier=0.5,
    )  # fmt: skip
    observation = make_observation(policy, batch=2, image_size=(20, 16), task=["push", "pull the lever"])
    assert observation["observation.state"].shape == (2, 8)
    assert observation["observation.images.camera1"].shape == (2, 3, 20, 16)
    assert observation["observation.language.attention_mask"].sum(1).tolist() == [5, 15]
    assert policy.model.vlm_with_expert.expert_hidden_size == 32
    assert chunk(policy, observation, make_noise(policy, batch=2)).shape == (2, 5, 7)


def test_folder_is_kept_when_given_and_gone_when_not(tmp_path: Path) -> None:
    make_policy("tiny", folder=tmp_path / "vlm")
    assert (tmp_path / "vlm" / "config.json").is_file()
    assert not Path(make_policy("tiny").config.vlm_model_name).exists()


@pytest.mark.long
def test_lerobots_class_still_says_what_it_lacks() -> None:
    # What stands as None in sys.modules is not found and cannot be imported.
    code = "import sys; sys.modules['num2words'] = None\n"
    code += "from smolvla_fast.testing.policies import make_policy; make_policy('tiny')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError" in done.stderr and "num2words" in done.stderr.splitlines()[-1]


def test_observation(policy: Any) -> None:
    observation = make_observation(policy, cameras=1)
    assert [key for key in observation if "images" in key] == ["observation.images.camera1"]
    frame = observation["observation.images.camera1"]
    assert frame.dtype is FP32 and frame.min() >= 0 and frame.max() <= 1
    assert make_observation(policy, task="t" * 100)["observation.language.tokens"].shape == (1, 101)
    again = make_observation(policy, cameras=1)
    assert all(torch.equal(observation[key], again[key]) for key in observation)


def test_frames_have_structure() -> None:
    """Flat areas and edges: most neighbours differ by the sensor noise alone, some by far more."""
    from smolvla_fast.testing.frames import draw_frame

    frame = draw_frame(120, 160, torch.Generator().manual_seed(0))
    steps = frame.diff(dim=2).abs()
    assert steps.median() < 0.03
    assert (steps > 0.2).float().mean() > 0.001


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: make_policy("huge"), "'full' and 'tiny'"),
        (lambda p: make_policy("tiny", layout="fp16"), "'mixed'"),
        (lambda p: make_observation(p, language_length=3), "21 tokens"),
        (lambda p: make_observation(p, batch=3, task=["a", "b"]), "2 tasks for a batch of 3"),
        (lambda p: make_observation(p, cameras=5), "the policy has"),
        (lambda p: make_observation(p, cameras=["observation.images.wrist"]), "the policy has"),
    ],
)
def test_errors_say_what_is_accepted(policy: Any, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(policy)


@pytest.mark.slow
def test_full_size_is_that_of_smolvla_base(monkeypatch: pytest.MonkeyPatch) -> None:
    # Sizes and dtypes do not depend on the values, which take most of the time.
    monkeypatch.setattr("smolvla_fast.testing.policies.fill_weights", lambda model, seed: None)
    policy = make_policy("full", layout="mixed")
    counts = Counter[torch.dtype]()
    for parameter in policy.parameters():
        counts[parameter.dtype] += parameter.numel()
    assert sum(counts.values()) == 450_046_176
    # 8 cross layers x k, v of 320 x 320; state, action and time projections.
    small = 32 * 960 + 960 + 2 * 32 * 720 + 720 + 32 + 3 * 720 * 720 + 2 * 720
    assert counts[FP32] == 8 * 2 * 320 * 320 + small
    assert len(policy.state_dict()) == 500
