"""Checkpoints that cross over, use without LeRobot, and what is refused."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy as LeRobotPolicy
from lerobot.policies.smolvla.processor_smolvla import (
    make_smolvla_pre_post_processors as make_lerobot_processors,
)
from lerobot.policies.utils import prepare_observation_for_inference
from safetensors.torch import load_file, save_file
from support.smolvla_pairs import (
    ACTION,
    CAMERAS,
    STATE,
    add_targets,
    assert_same,
    lerobot_config,
    make_batch,
    make_noise,
    make_pair,
    our_config,
)

from smolvla_fast.smolvla import SmolVLAConfig, SmolVLAPolicy
from smolvla_fast.smolvla.smolvlm_with_expert import SmolVLMWithExpertModel

pytestmark = pytest.mark.reference

ROOT = Path(__file__).parents[2]


def _stats() -> dict[str, dict[str, torch.Tensor]]:
    values = torch.linspace(-1, 2, 6)
    return {key: {"mean": values, "std": values.abs() + 0.5} for key in (STATE, ACTION)}


@pytest.mark.parametrize("kind", ["plain", "weights", "bf16_text", "biased"])
def test_weights_cross_both_ways_byte_by_byte(backbones, tmp_path, kind):
    config = lerobot_config(backbones(kind), load_vlm_weights=kind == "weights", num_vlm_layers=3)
    pair = make_pair(config)
    pair.stock.save_pretrained(tmp_path / "theirs")
    ours = SmolVLAPolicy.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes(), name
    stock = LeRobotPolicy.from_pretrained(tmp_path / "ours", strict=True)
    assert not ours.training and not stock.training
    chunks = [
        p.predict_action_chunk(make_batch(config), noise=make_noise(config))
        for p in (pair.stock, stock, ours)
    ]
    assert_same("crossed chunks", kind, chunks[0], chunks[1])
    assert_same("crossed chunks", kind, chunks[0], chunks[2])


def test_state_dict_given_by_the_caller_is_written(backbones, tmp_path):
    pair = make_pair(lerobot_config(backbones()))
    state = {name: value.clone() for name, value in pair.ours.state_dict().items()}
    state["model.state_proj.bias"] += 1
    pair.ours.save_pretrained(tmp_path, state_dict=state)
    loaded = SmolVLAPolicy.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_backbone_loads_sharded_and_tied_weights(backbones, tmp_path):
    """Weights of the backbone in several files, and one whose head is its embedding."""
    import json

    from transformers import AutoConfig, AutoModelForImageTextToText

    folder = Path(backbones("weights"))
    whole = SmolVLMWithExpertModel(str(folder), num_vlm_layers=2).vlm
    sharded = tmp_path / "sharded"
    AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    again = SmolVLMWithExpertModel(str(sharded), num_vlm_layers=2).vlm
    for (name, a), (_, b) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert a.dtype == b.dtype == torch.bfloat16 and torch.equal(a, b), name

    values = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    tied = tmp_path / "tied"
    tied.mkdir()
    (tied / "config.json").write_text(json.dumps(values))
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tied / "model.safetensors", {"format": "pt"})
    assert AutoConfig.from_pretrained(tied).tie_word_embeddings
    vlm = SmolVLMWithExpertModel(str(tied)).vlm
    assert vlm.lm_head.weight is vlm.model.text_model.embed_tokens.weight
    assert torch.equal(vlm.lm_head.weight, tensors["model.text_model.embed_tokens.weight"])


def test_copies_and_pickles_answer_alike(backbones):
    """copy, deepcopy and pickle give policies that answer alike; a shallow copy has its own queue after reset."""
    pair = make_pair(lerobot_config(backbones(), add_image_special_tokens=True))
    batch, noise = make_batch(pair.stock.config), make_noise(pair.stock.config)
    wanted = pair.ours.predict_action_chunk(batch, noise=noise)
    shallow = copy.copy(pair.ours)
    for policy in (copy.deepcopy(pair.ours), pickle.loads(pickle.dumps(pair.ours)), shallow):
        assert torch.equal(wanted, policy.predict_action_chunk(batch, noise=noise))
    shallow.reset()
    shallow.select_action(batch)
    assert len(pair.ours._queues[ACTION]) == 0


def test_no_source_imports_lerobot():
    """That importing loads nothing of it either: tests/acceptance/test_import_and_status.py."""
    sources = (path.read_text() for path in (ROOT / "smolvla_fast/smolvla").glob("*.py"))
    assert not any(
        line.strip().startswith(("import lerobot", "from lerobot"))
        for s in sources
        for line in s.splitlines()
    )


RUNNER = """
import os, runpy, sys
sys.modules["lerobot"] = None
import torch
torch.set_num_threads(1)
import smolvla_fast.smolvla.flow_model as model
draw = model.sample_noise
model.sample_noise = lambda *args: (torch.manual_seed(0), draw(*args))[1]
script, folder, out = sys.argv[1:]
sys.argv = [script, folder]
actions = []
for disable in ("1", ""):
    os.environ["SMOLVLA_FAST_DISABLE"] = disable
    actions.append(runpy.run_path(script)["action"])
assert not [name for name in sys.modules if name.startswith("lerobot.")]
torch.save(actions, out)
"""


@pytest.fixture(scope="module")
def lerobot_checkpoint(backbones, tmp_path_factory):
    """What ``lerobot-train`` leaves behind, and the action LeRobot's classes take with it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = lerobot_config(backbones(), empty_cameras=1, frame=(3, 480, 640))
    policy = make_pair(config).stock.eval()
    policy.save_pretrained(folder)
    pre, post = make_lerobot_processors(config, _stats())
    pre.save_pretrained(folder), post.save_pretrained(folder)
    rng = np.random.default_rng(0)
    observation = {camera: rng.integers(0, 256, (480, 640, 3), dtype=np.uint8) for camera in CAMERAS}
    observation[STATE] = rng.standard_normal(6, dtype=np.float32)
    batch = prepare_observation_for_inference(observation, torch.device("cpu"), "pick up the cube")
    with torch.random.fork_rng():
        batch = pre(batch)
        torch.manual_seed(0)
        action = post(policy.select_action(batch))
    return folder, action


def _run_example(python: str, folder: Path, out: Path) -> list[torch.Tensor]:
    """The example's action on stock, then patched."""
    arguments = [python, "-c", RUNNER, str(ROOT / "examples/standalone.py"), str(folder), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(out)


def test_standalone_example_where_lerobot_cannot_be_imported(lerobot_checkpoint, tmp_path):
    """Raw frames, state and task to an action in the robot's units: unpatched, the very one that LeRobot takes.

    Patched, the engine adds up in another order; 1e-5 as in the test below.
    """
    folder, wanted = lerobot_checkpoint
    out = tmp_path / "action.pt"
    action, patched = _run_example(sys.executable, folder, out)
    assert action.shape == (1, 6) and torch.equal(action, wanted)
    torch.testing.assert_close(patched, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.equal(patched, wanted), "the engine did not serve it"


def test_standalone_example_is_ten_lines():
    lines = (ROOT / "examples/standalone.py").read_text().split('"""')[2].splitlines()
    code = [line for line in lines if line.strip() and not line.startswith(("import", "from"))]
    assert len(code) <= 10


def test_standalone_example_without_a_checkpoint_says_how_it_is_called():
    done = subprocess.run([sys.executable, ROOT / "examples/standalone.py"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "usage: standalone.py CHECKPOINT_FOLDER\n")


@pytest.mark.long
@pytest.mark.slow
def test_standalone_example_on_other_pythons(lerobot_checkpoint, tmp_path):
    """The same with interpreters that have no LeRobot at all, named in SMOLVLA_FAST_PYTHONS (separated by
    ``:``).

    Another torch release may round differently: 1e-5 is a hundred times what reordered fp32 sums give on values
    of this size, and far below what any mistake does.
    """
    pythons = [p for p in os.environ.get("SMOLVLA_FAST_PYTHONS", "").split(os.pathsep) if p]
    if not pythons:
        pytest.skip("SMOLVLA_FAST_PYTHONS names no interpreter without LeRobot")
    folder, wanted = lerobot_checkpoint
    for python in pythons:
        absent = "import importlib.util as u; raise SystemExit(u.find_spec('lerobot') is not None)"
        assert subprocess.run([python, "-c", absent]).returncode == 0, f"{python} has LeRobot installed"
        _, action = _run_example(python, folder, tmp_path / "action.pt")
        torch.testing.assert_close(action, wanted, atol=1e-5, rtol=1e-5)


@pytest.fixture
def checkpoint(backbones, tmp_path):
    pair = make_pair(lerobot_config(backbones()))
    pair.ours.save_pretrained(tmp_path)
    return pair, tmp_path


def test_load_refuses_bad_weights_files(checkpoint):
    """Truncated, foreign, incomplete, oversized and misshapen files name what is wrong; none loads half."""
    pair, folder = checkpoint
    path = folder / "model.safetensors"
    # Copies: what load_file returns is the file itself, which is about to be overwritten.
    whole, tensors = path.read_bytes(), {name: value.clone() for name, value in load_file(path).items()}

    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        SmolVLAPolicy.from_pretrained(folder)
    path.write_bytes(b"PK\x03\x04 a zip of something else")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        SmolVLAPolicy.from_pretrained(folder)
    save_file({"layer.weight": torch.zeros(3)}, path)
    with pytest.raises(RuntimeError, match=r"missing: .* and \d+ more; unexpected: layer.weight"):
        SmolVLAPolicy.from_pretrained(folder)

    absent = {name: value for name, value in tensors.items() if name != "model.action_out_proj.bias"}
    save_file(absent, path)
    with pytest.raises(RuntimeError, match=r"missing: model\.action_out_proj\.bias.*strict=False"):
        SmolVLAPolicy.from_pretrained(folder)
    lenient = SmolVLAPolicy.from_pretrained(folder, strict=False).state_dict()
    assert all(torch.equal(lenient[name], value) for name, value in absent.items())

    save_file({**tensors, "normalize_inputs.buffer_observation_state.mean": torch.zeros(6)}, path)
    with pytest.raises(RuntimeError, match=r"unexpected: normalize_inputs.*before LeRobot 0\.4"):
        SmolVLAPolicy.from_pretrained(folder)
    save_file({name.replace("model.", "model._orig_mod.", 1): value for name, value in tensors.items()}, path)
    with pytest.raises(RuntimeError, match="compiled module"):
        SmolVLAPolicy.from_pretrained(folder)

    save_file({**tensors, "model.state_proj.bias": torch.zeros(3)}, path)
    for strict in (True, False):
        with pytest.raises(
            RuntimeError, match=r"misshapen: model\.state_proj\.bias \(file \(3,\), model \(64,\)\)"
        ):
            SmolVLAPolicy.from_pretrained(folder, strict=strict)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors not found in"):
        SmolVLAPolicy.from_pretrained(folder)
    with pytest.raises(TypeError, match="devic"):
        SmolVLAPolicy.from_pretrained(folder, devic="cpu")
    assert pair.ours is not None


def test_construction_refuses_bad_arguments(backbones, tmp_path):
    config = lerobot_config(backbones())
    with pytest.raises(ValueError, match="must be a smolvla_fast SmolVLAConfig, got lerobot"):
        SmolVLAPolicy(config)
    missing = our_config(lerobot_config(str(tmp_path / "nowhere")))
    with pytest.raises(FileNotFoundError, match=r"config\.json of .*nowhere.* not found"):
        SmolVLAPolicy(missing)
    with pytest.raises(FileNotFoundError, match="load_vlm_weights=False"):
        SmolVLAPolicy(our_config(lerobot_config(backbones(), load_vlm_weights=True)))
    with pytest.raises(ValueError, match=r"num_expert_layers \(3\) must divide .* \(4\)"):
        SmolVLAPolicy(our_config(lerobot_config(backbones(), num_expert_layers=3)))
    with pytest.raises(ValueError, match="num_expert_layers=2 and self_attn_every_n_layers=2"):
        SmolVLAPolicy(our_config(lerobot_config(backbones(), num_expert_layers=2)))
    with pytest.raises(ValueError, match="even width, got 63"):
        narrow = SmolVLAPolicy(our_config(lerobot_config(backbones(), expert_width_multiplier=0.99)))
        narrow.predict_action_chunk(make_batch(config))


def _changed(batch, **changes):
    batch = {**batch, **{key.replace("__", "."): value for key, value in changes.items()}}
    return {key: value for key, value in batch.items() if value is not None}


def test_bad_batches(backbones, caplog):
    config = lerobot_config(backbones())
    policy = make_pair(config).ours
    batch = make_batch(config)
    top, front = "observation.images.top", CAMERAS[0]

    def refused(error, match, asked, call=policy.predict_action_chunk, **kwargs):
        with pytest.raises(error, match=match):
            call(asked, **kwargs)

    renamed = {top if key == front else key: value for key, value in batch.items() if key != CAMERAS[1]}
    refused(ValueError, rf"accepted are .*{front}.*got .*{top}", renamed)
    assert policy.predict_action_chunk({**renamed, CAMERAS[1]: batch[CAMERAS[1]]}).shape == (2, 8, 6)
    assert front in caplog.text and f"{[top]} of the batch are not declared" in caplog.text
    refused(KeyError, "observation.state", {k: v for k, v in batch.items() if k != STATE})
    refused(KeyError, "preprocessor", {k: v for k, v in batch.items() if "tokens" not in k})
    refused(
        ValueError,
        "has 40 values, config.max_state_dim accepts at most 32",
        {**batch, STATE: torch.zeros(2, 40)},
    )
    refused(ValueError, rf"{front} must be \[batch", {**batch, front: torch.zeros(3, 24, 40)})
    refused(ValueError, r"noise must have shape \(2, 8, 32\)", batch, noise=torch.zeros(2, 7, 32))
    refused(TypeError, "inference_dely", batch, inference_dely=3)
    refused(ValueError, "reduction must be", add_targets(config, batch), policy.forward, reduction="sum")
    refused(KeyError, "'action' is missing", batch, policy.forward)
    wide = {**batch, ACTION: torch.zeros(2, 8, 33)}
    refused(ValueError, "has 33 values, config.max_action_dim accepts at most 32", wide, policy.forward)
    refused(ValueError, "chunk_size=8 steps, got 5", {**batch, ACTION: torch.zeros(2, 5, 6)}, policy.forward)
    policy.config.num_steps = 0
    refused(ValueError, "num_steps must be at least 1", batch)
    policy.config.num_steps, policy.config.use_cache = 2, False
    refused(ValueError, "use_cache=False can train only", batch)
    policy.config.use_cache, policy.config.resize_imgs_with_padding = True, (24, 32)
    refused(ValueError, "scale_factor", batch)
    policy.config.resize_imgs_with_padding, policy.config.adapt_to_pi_aloha = (32, 32), True
    refused(ValueError, "adapt_to_pi_aloha needs 14 motors in observation.state, got 6", batch)
    policy.config.adapt_to_pi_aloha, policy.config.output_features = False, {}
    refused(ValueError, "output_features must declare 'action'", batch)


def test_rtc_refuses_bad_calls(backbones):
    from smolvla_fast.smolvla import RTCConfig

    config = our_config(lerobot_config(backbones()))
    policy = SmolVLAPolicy(config)
    batch, noise = make_batch(config), make_noise(config)
    config.rtc_config = RTCConfig()
    with pytest.raises(ValueError, match="init_rtc_processor"):
        policy.predict_action_chunk(batch, inference_delay=1, prev_chunk_left_over=noise)
    policy.init_rtc_processor()
    with pytest.raises(AssertionError, match="predict_action_chunk"):
        policy.select_action(batch)
    with pytest.raises(TypeError, match="inference_delay must be an integer"):
        policy.predict_action_chunk(batch, prev_chunk_left_over=noise)
    for previous in (torch.zeros(2, 9, 32), torch.zeros(2, 8, 33), torch.zeros(3, 8, 32)):
        with pytest.raises(ValueError, match="does not fit a chunk"):
            policy.predict_action_chunk(batch, inference_delay=1, prev_chunk_left_over=previous)
    assert policy.supports_rtc()


def test_fewer_experts_train_but_do_not_sample(backbones):
    config = our_config(lerobot_config(backbones(), num_expert_layers=2, attention_mode="self_attn"))
    policy = SmolVLAPolicy(config)
    assert policy(add_targets(config, make_batch(config)))[0].isfinite()
    with pytest.raises(ValueError, match=r"num_expert_layers=2 of 4 can be trained"):
        policy.predict_action_chunk(make_batch(config))


def test_policy_reads_settings_when_called(backbones):
    """Settings are read at each call; a longer n_action_steps counts from the next reset, as in LeRobot."""
    pair = make_pair(lerobot_config(backbones(), n_action_steps=1))
    batch = make_batch(pair.stock.config)
    served = []
    for policy in (pair.stock, pair.ours):
        policy.config.num_steps = 5
        policy.config.n_action_steps = 4
        torch.manual_seed(1)
        served.append([policy.select_action(dict(batch)) for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*served, strict=True))
    assert isinstance(pair.ours.config, SmolVLAConfig)


def test_the_docs_show_the_standalone_example():
    code = (ROOT / "examples/standalone.py").read_text().split('"""\n', 2)[-1].strip()
    assert code in (ROOT / "docs/standalone.md").read_text()
