"""Every command refuses arguments and checkpoints that cannot work: with status 2 and a sentence, never a traceback."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from smolvla_fast.cli import COMMANDS, DEBUG, main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy in a folder, of our own class, so that this runs without LeRobot too."""
    from smolvla_fast.smolvla import make_smolvla_pre_post_processors
    from smolvla_fast.testing.policies import make_policy

    root = tmp_path_factory.mktemp("policy")
    policy = make_policy("tiny", origin="ours", folder=root / "vlm", num_steps=3)
    policy.save_pretrained(root / "saved")
    sizes = {"observation.state": policy.config.robot_state_feature, "action": policy.config.action_feature}
    stats = {key: {"mean": [0.0] * f.shape[0], "std": [1.0] * f.shape[0]} for key, f in sizes.items()}
    for pipeline in make_smolvla_pre_post_processors(policy.config, stats):
        pipeline.save_pretrained(root / "saved")
    return root / "saved"


def status_of(arguments: list[str]) -> Any:
    try:
        return main(arguments)
    except SystemExit as stop:  # argparse's own refusals
        return stop.code


def refuses(arguments: list[str], capsys: pytest.CaptureFixture[str], *says: str) -> None:
    status = status_of(arguments)
    message = capsys.readouterr().err
    assert status == 2, message
    assert "Traceback" not in message and "did not foresee" not in message, message
    assert all(word in message for word in says), message


def config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Damage to a checkpoint: ``change`` of the values of its config.json, or what it returns in their place."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        changed = change(values)
        (folder / "config.json").write_text(json.dumps(values if changed is None else changed))

    return damage


def file(name: str, content: bytes | None) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)

    return damage


def shaped(name: str, shape: Any, kind: str | None = None) -> Callable[[Path], None]:
    """Another shape, and type, of a feature that a config.json declares."""
    field = "output_features" if name == "action" else "input_features"
    more = {"shape": shape, **({"type": kind} if kind else {})}
    return config(lambda values: values[field][name].update(more))


def blank(folder: Path) -> None:
    """A configuration with no camera but an empty one."""

    def change(values: dict[str, Any]) -> None:
        cameras = [values["input_features"].pop(k) for k in [*values["input_features"]] if ".images." in k]
        values["input_features"]["observation.images.empty_camera_0"] = cameras[0]

    config(change)(folder)


def step(**more: Any) -> Callable[[Path], None]:
    """Other entries of the preprocessor's step that normalises."""

    def damage(folder: Path) -> None:
        path = folder / "policy_preprocessor.json"
        values = json.loads(path.read_text())
        next(s for s in values["steps"] if s["registry_name"] == "normalizer_processor").update(more)
        path.write_text(json.dumps(values))

    return damage


def shorten(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def compiled(folder: Path) -> None:
    """The names of a compiled model, of which LeRobot's loader takes none."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {
        name.replace("model.", "model._orig_mod.", 1): each.clone() for name, each in load_file(path).items()
    }
    save_file(tensors, path, {"format": "pt"})


def without(*names: str) -> Callable[[Path], None]:
    def change(values: dict[str, Any]) -> None:
        for features in ("input_features", "output_features"):
            values[features] = {k: v for k, v in values[features].items() if not k.startswith(names)}

    return config(change)


DAMAGE = {
    "no config": (file("config.json", None), "no config.json"),
    "broken json": (file("config.json", b'{"type": "smol'), "cannot read config.json"),
    "bytes": (file("config.json", b"\xff\xfe\x00"), "cannot read config.json"),
    "empty": (file("config.json", b""), "cannot read config.json"),
    "a list": (config(lambda values: [values]), "not of 'smolvla'"),
    "act": (config(lambda values: values.update(type="act")), "is of 'act'"),
    "pi0": (config(lambda values: {"type": "pi0", "n_obs_steps": 1}), "is of 'pi0'"),
    "no type": (config(lambda values: values.pop("type")and None), "is of None"),
    "no state": (without("observation.state"), "no observation.state"),
    "no cameras": (without("observation.images"), "no a camera"),
    "no action": (without("action"), "no action"),
    "no features": (config(lambda values: values.update(input_features=None, output_features=None)), "no observation.state"),
    "features of another kind": (config(lambda values: values.update(input_features=[1])), "cannot read config.json"),
    "no weights": (file("model.safetensors", None), "model.safetensors"),
    "truncated weights": (shorten, "cannot load it"),
    "other weights": (file("model.safetensors", b"not weights"), "cannot load it"),
    "names of a compiled model": (compiled, "puts '_orig_mod.' into the names"),
    "other shapes": (config(lambda values: values.update(max_action_dim=16)), "cannot load it"),
    "a backbone that was not downloaded": (
        config(lambda values: values.update(vlm_model_name="owner/no-backbone")),
        "owner/no-backbone, vlm_model_name of config.json, is not on this machine: where the Hub can be reached, run `hf ",
    ),
    "another backbone": (config(lambda values: values.update(vlm_model_name="/nowhere")), "cannot load it"),
    "chunk of 0": (config(lambda values: values.update(chunk_size=0, n_action_steps=0)), ""),
    "more steps than a chunk": (config(lambda values: values.update(n_action_steps=99)), "cannot load it"),
    "an unknown field": (config(lambda values: values.update(horizon=3)), "cannot load it"),
    "a state too wide": (config(lambda values: values["input_features"]["observation.state"].update(shape=[99])), ""),
    "a camera of one number": (shaped("observation.images.camera1", [3]), "[channels, height, width]"),
    "a camera of two numbers": (shaped("observation.images.camera1", [16, 24]), "[channels, height, width]"),
    "a camera without shape": (shaped("observation.images.camera1", None), "[channels, height, width]"),
    "a state of no dimension": (shaped("observation.state", []), "has the shape []; accepted is [n]"),
    "a state of 0": (shaped("observation.state", [0]), "has the shape [0]; accepted is [n]"),
    "an action of no dimension": (shaped("action", []), "output_features['action'] has the shape []"),
    "a state among the cameras": (shaped("observation.state", [6], "VISUAL"), "no observation.state of type STATE"),
    "only empty cameras": (blank, "not an empty one"),
    "no denoise steps": (config(lambda values: values.update(num_steps=0)), "num_steps is 0"),
    "words for a chunk": (config(lambda values: values.update(chunk_size="fifty")), "chunk_size is 'fifty'"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "command"), list(zip(DAMAGE, cycle(["verify", "demo"]), strict=False)))
def test_a_damaged_checkpoint_is_refused(
    name: str, command: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    damage, says = DAMAGE[name]
    folder = shutil.copytree(saved, tmp_path / "damaged")
    damage(folder)
    monkeypatch.chdir(tmp_path)
    refuses(
        [command, "--policy.path", str(folder), "--threads", "1"], capsys, f"smolvla-fast {command}: ", says
    )
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize(
    ("command", "damage", "says"),
    [
        ("demo", step(config=None), "has config null; accepted is an object"),
        ("verify", step(config=[]), "has config []; accepted is an object"),
        ("demo", step(state_file=3), "has state_file 3; accepted is a file's name"),
        ("verify", step(config={"features": {}, "norm_map": None}), "refuses its settings"),
        ("demo", file("policy_preprocessor.json", b'{"steps": null}'), "must have 'steps'"),
        ("verify", file("policy_postprocessor.json", None), "policy_postprocessor.json not found"),
    ],
    ids=["null", "a-list", "state-file", "null-map", "no-steps", "one-missing"],
)  # fmt: skip
def test_damaged_processors_are_refused_with_a_way_out(
    command: str, damage, says, saved: Path, tmp_path: Path, capsys
) -> None:
    folder = shutil.copytree(saved, tmp_path / "damaged")
    damage(folder)
    arguments = [command, "--policy.path", str(folder), "--threads", "1"]
    refuses(arguments, capsys, says, "copy or download", "dataset_stats")


@pytest.mark.parametrize(
    "buffers", [{}, {"normalize_inputs.buffer_observation_state.mean": 6}], ids=["none", "half"]
)
def test_verify_refuses_a_policy_without_processors_or_statistics(
    buffers, saved: Path, tmp_path: Path, capsys
) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(saved, tmp_path / "bare")
    for path in folder.glob("policy_*"):
        path.unlink()
    weights = folder / "model.safetensors"
    more = {name: torch.ones(size) for name, size in buffers.items()}
    save_file({**{k: v.clone() for k, v in load_file(weights).items()}, **more}, weights, {"format": "pt"})
    command = ["verify", "--policy.path", str(folder), "--threads", "1", "--frames", "1"]
    refuses(command, capsys, "observation.state (", "action (", "dataset_stats", "IDENTITY")
    if not buffers:
        config(
            lambda values: values.update(normalization_mapping={"STATE": "IDENTITY", "ACTION": "IDENTITY"})
        )(folder)
        assert main(command) == 0


def test_verify_says_what_stock_itself_refuses(saved: Path, capsys, monkeypatch) -> None:
    """An error of stock's that nobody foresaw, as demo has it."""

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("float division by zero")

    for package in ("smolvla_fast.smolvla", "lerobot.policies.smolvla"):
        with contextlib.suppress(ImportError):
            policy_class = import_module(f"{package}.modeling_smolvla").SmolVLAPolicy
            monkeypatch.setattr(policy_class, "predict_action_chunk", fail)
    monkeypatch.setattr("smolvla_fast.cli.verify.compare", fail)
    arguments = ["verify", "--policy.path", str(saved), "--threads", "1"]
    refuses(arguments, capsys, "stock itself computes no chunk", "ZeroDiv")


SUBJECT = [
    (["--policy.path", "nowhere"], "--policy.path nowhere: no such folder"), (["--policy.path", "a/b/c"], "no such folder"),
    (["--policy.path", ""], "--policy.path is empty"), (["--policy.path", "FOLDER"], "no config.json"),
    (["--policy.path", "FILE"], "a file"), (["--policy.path", "a\x00b"], "--policy.path"),
    (["--policy.path", "owner/no-such-policy"], "--policy.path owner/no-such-policy"),
    (["--precision", "fp4"], "'exact', 'fp32', 'bf16'"), (["--precision", ""], "--precision"),
    (["--backend", "abacus"], "'torch'"), (["--backend", "cuda"], "cuda"),
    (["--backend", "triton", "--precision", "exact"], "exact"),
    (["--device", "gpu"], "--device gpu: not a device; accepted are auto, cpu, cuda, cuda:N"),
    (["--device", "mps"], "not a device"), (["--device", "meta"], "not a device"),
    (["--device", "cuda:1st"], "not a device"), (["--device", "cuda:99"], "--device cuda:99"),
    (["--device", ""], "--device"), (["--cameras", "0"], "--cameras"), (["--cameras", "-1"], "--cameras"),
    (["--cameras", "two"], "--cameras"),
    (["--cameras", "1000000"], "--cameras"),
    (["--cameras", "3", "--policy.path", "SAVED"], "--cameras 3: cameras=3: the policy has"),
    (["--steps", "0"], "--steps"), (["--steps", "1.5"], "--steps"), (["--steps", "²"], "--steps"), (["--steps"], "--steps"),
    (["--threads", "0"], "--threads"), (["--threads", "99999999"], "--threads"), (["--seed", "x"], "--seed"),
    (["--seed", "-1"], "--seed"), (["--seed", "99999999999999999999999"], "--seed"), (["--size", "huge"], "--size"),
    (["--layout", "mixed", "--policy.path", "SAVED"], "made policies"), (["--layout", "fp4"], "--layout"),
    (["--json", "FILE/a.json"], "FILE/a.json"), (["--json", "/proc/no/a.json"], "/proc/no/a.json"),
    (["--json", ""], "--json"),
    (["--json", "FOLDER"], "directory"), (["--json", "a\x00b"], "--json"), (["--jsn", "a"], "did you mean --json?"),
    (["x"], "x"),
]  # fmt: skip
OWN = {
    "demo": [
        (["--rounds", "0"], "--rounds"), (["--plot", "a.xyz"], "--plot a.xyz"), (["--plot", "FILE/a.png"], "FILE/a.png"),
        (["--plot", ""], "--plot"), (["--round", "3"], "did you mean --rounds?"),
    ],
    "verify": [
        (["--frames", "0"], "--frames"), (["--observation", "3"], "did you mean --observations?"),
        (["--observations", "2"], "needs the policy that the recording is for; give --policy.path"),
        (["--observations", "2", "--policy.path", "SAVED"], "no such folder"),
        (["--observations", "2", "--policy.path", "SAVED"], "the number of frames is --frames"),
        (["--observations", "FILE", "--policy.path", "SAVED"], "a file; accepted is a folder with .npz or .pt files"),
        (["--observations", "FOLDER", "--policy.path", "SAVED"], "no observation in FOLDER"),
        (["--observations", "FOLDER", "--dataset.root", "FOLDER", "--policy.path", "SAVED"], "name two recordings"),
        (["--observations", "FOLDER", "--cameras", "1", "--policy.path", "SAVED"], "--cameras is for drawn frames"),
        (["--dataset.episodes", "0,1"], "need --dataset.repo_id or --dataset.root"),
        (["--dataset.episodes", "0-4"], "accepted is one such as 0,3,7"),
        (["--observations", "FOLDER", "--dataset.episodes", "0", "--policy.path", "SAVED"], "say nothing of --observations"),
        (["--observations", "FOLDER", "--dataset.units", "mm", "--policy.path", "SAVED"], "units in its info.json"),
        (["--dataset.video_backend", "pyav"], "need --dataset.repo_id or --dataset.root"),
        (["--dataset.units", "mm"], "need --dataset.repo_id or --dataset.root"),
        (["--dataset.units", ""], "accepted is one for all joints"), (["--dataset.units", "mm,cm"], "names no units"),
        (["--dataset.units", "a="], "names no units"), (["--dataset.units", "a=mm,a=cm"], "names no units"),
        (["--json", "report.md"], "the name of the figures, such as report.json"), (["--json", "a.HTML"], "a.json"),
        (["--max_minutes", "0"], "--max_minutes"), (["--max_minutes", "nan"], "--max_minutes"),
        (["--precision", "fp32,fp4"], "'exact', 'fp32', 'bf16'"), (["--precision", "fp32,"], "--precision"),
    ],
    "doctor": [
        (["--json", "FILE/a.json"], "FILE/a.json"), (["--json", "FOLDER"], "directory"), (["--json", ""], "--json"),
        (["--json"], "--json"), (["--jsno=a"], "did you mean --json?"), (["x"], "x"),
    ],
    "bench": [
        (["speed"], "no suite 'speed'"), (["--suite", ""], "no suite"), (["--cameras", "0"], "--cameras 0"),
        (["--cameras", "1,x"], "--cameras 1,x"), (["--rounds", "x"], "--rounds"), (["--steps", "0"], "--steps"),
        (["--threads", "99999999"], "--threads"), (["--size", "huge"], "--size"), (["--layout", "fp4"], "--layout"),
        (["--device", "gpu"], "--device gpu"), (["--json", "FILE/a.json"], "FILE/a.json"), (["--json", ""], "--json"),
        (["cpu", "--cameras", "9"], "--cameras 9"), (["cpu", "--device", "cuda"], "--device cuda"),
        (["--ful"], "did you mean --full?"), (["--json", "report.html"], "give the name of the figures, such as"),
    ],
}  # fmt: skip
# demo and verify read these arguments, and checkpoints, by the same lines, so they take turns.
CASES = [(command, *case) for command, case in zip(cycle(["demo", "verify"]), SUBJECT, strict=False)]
CASES += [(command, *case) for command, cases in OWN.items() for case in cases]


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    CASES,
    ids=[f"{command} {' '.join(words)!r}" for command, words, _ in CASES],
)
def test_an_argument_that_cannot_work_is_refused(
    command: str, arguments: list[str], says: str, saved: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("kept")
    (tmp_path / "FOLDER").mkdir()
    arguments = [str(saved) if word == "SAVED" else word for word in arguments]
    size = ["--size", "tiny"] if command in ("demo", "verify") else []
    refuses([command, *size, *arguments], capsys, says)
    assert {path.name for path in tmp_path.iterdir()} == {"FILE", "FOLDER"}


@pytest.mark.parametrize("inner", ["checkpoints/last/pretrained_model", "pretrained_model"])
def test_a_training_runs_folder_names_its_last_checkpoint(
    inner: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / inner).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / inner).symlink_to(saved)
    refuses(
        ["demo", "--policy.path", str(tmp_path)], capsys, f"no config.json in it; give {tmp_path / inner}"
    )


@pytest.fixture
def server() -> Iterator[Any]:
    """LeRobot's server. Its import logs to the streams that pytest captures now and closes after the test."""
    root, level = logging.getLogger(), logging.getLogger().level
    yield pytest.importorskip("lerobot.async_inference.policy_server", reason="the server is LeRobot's")
    for handler in [h for h in root.handlers if type(h) in (logging.StreamHandler, logging.FileHandler)]:
        root.removeHandler(handler)
    root.setLevel(level)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port=abc"], "--port=abc"), (["--port=99999999"], "between 1 and 65535"), (["--port=0"], "between 1 and 65535"),
        (["--port=TAKEN"], "cannot listen there"), (["--port=null"], "--port=null"), (["--port=[1"], "--port=[1"),
        (["--host=no.such.host.invalid"], "--host=no.such.host.invalid"), (["--host=203.0.113.7"], "cannot listen there"),
        (["--fps=0"], "fps must be above 0, got 0"), (["--fps=x"], "--fps=x"),
        (["--inference_latency=-1"], "--inference_latency=-1"),
        (["--precision", "fp4"], "--precision"), (["--backend", "abacus"], "--backend"), (["--prt=1"], "--prt"),
        (["--port"], "--port"),
        (["--config_path=/nowhere"], "/nowhere"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_serve_refuses_what_it_cannot_serve(
    arguments: list[str], says: str, server, capsys, monkeypatch
) -> None:
    """Before LeRobot's server is started, and before anything is patched."""
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    monkeypatch.setattr(server, "serve", lambda config: pytest.fail(f"served {config}"))
    stock = SmolVLAPolicy.from_pretrained.__func__
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refuses(
            ["serve", "--host=127.0.0.1", *(word.replace("TAKEN", port) for word in arguments)], capsys, says
        )
    assert SmolVLAPolicy.from_pretrained.__func__ is stock


def test_serve_listens_on_a_free_port(server, monkeypatch) -> None:
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    served = []
    monkeypatch.setattr(server, "serve", served.append)
    monkeypatch.setattr(SmolVLAPolicy, "from_pretrained", SmolVLAPolicy.from_pretrained)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert main(["serve", "--host=localhost", f"--port={port}"]) == 0
    assert [config.port for config in served] == [port]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_error_that_nobody_foresaw_is_a_sentence(command: str, capsys, monkeypatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the sky\nfell")

    monkeypatch.setattr(import_module(f"smolvla_fast.cli.{command}"), "run", fail)
    monkeypatch.delenv(DEBUG, raising=False)
    assert main([command]) == 2
    error = capsys.readouterr().err
    assert (
        f"smolvla-fast {command}: RuntimeError: the sky fell" in error
        and f"{DEBUG}=1" in error
        and "Trace" not in error
    )
    monkeypatch.setenv(DEBUG, "1")
    with pytest.raises(RuntimeError, match="the sky"):
        main([command])


# Stands for an environment without the package: imports of it fail, and looking for it finds nothing.
ABSENT = """
import sys, importlib.abc
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in {names} else find(name, package)
from smolvla_fast.cli import main
import contextlib, io, json
found = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    found.append((status, out.getvalue(), err.getvalue()))
print(json.dumps(found))
"""
BARE = {"lerobot", "draccus", "mergedeep", "rich", "matplotlib", "datasets", "accelerate", "peft"}


def without_lerobot(
    folder: Path, *commands: list[str], python: str = sys.executable
) -> list[tuple[int, str, str]]:
    """Status, output and errors of commands, in one process, where LeRobot, and what only it brings, is not installed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    code = ABSENT.format(names=BARE if python == sys.executable else ["lerobot"])
    done = subprocess.run(
        [python, "-c", code, json.dumps(commands)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(each) for each in json.loads(done.stdout)]


def demo(saved: Path) -> list[str]:
    return ["demo", "--threads", "1", "--rounds", "1", "--policy.path", str(saved)]


def demonstrated(folder: Path, status: int, out: str, err: str, python: str = sys.executable) -> None:
    assert status == 0, err
    found = json.loads((folder / "demo.json").read_text())
    assert found["policy"]["whose"] == "smolvla_fast" and found["status"]["calls_stock"] == 0
    assert found["lerobot_version"] is None or python == sys.executable  # there it is hidden, not absent
    # fp32 against fp32: sums in another order, as tests/cli/test_cli.py has it.
    assert 0 < found["rel_l2"] <= 1e-5
    assert "LeRobot is not installed: stock is smolvla_fast's own SmolVLA" in out
    assert "matplotlib is not installed" in out and not (folder / "demo.png").exists()


def test_demo_and_verify_run_without_lerobot(saved: Path, tmp_path: Path) -> None:
    """Our own class, made and loaded; verify on saved observations; a dataset is LeRobot's, and that is said."""
    from smolvla_fast.smolvla import SmolVLAPolicy
    from smolvla_fast.testing.observations import make_observation

    (tmp_path / "log").mkdir()
    drawn = make_observation(SmolVLAPolicy.from_pretrained(saved))
    torch.save(
        {key: value for key, value in drawn.items() if "language" not in key}, tmp_path / "log" / "0.pt"
    )
    verify = ["verify", "--policy.path", str(saved), "--threads", "1"]
    own = ["demo", "--size", "tiny", "--threads", "1", "--rounds", "1", "--json", "own.json"]
    loaded, made, verified, refused = without_lerobot(
        tmp_path, demo(saved), own, [*verify, "--observations", "log"], [*verify, "--dataset.root", "log"]
    )
    demonstrated(tmp_path, *loaded)
    assert made[0] == 0 and "smolvla_fast's own SmolVLA" in made[1], made[2]
    status, out, err = verified
    assert status == 0 and "Passed: " in out and "no pictures: matplotlib" in out, err
    assert (tmp_path / "verify.json").is_file() and "Passed: " in (tmp_path / "verify.md").read_text()
    assert refused[0] == 2 and "smolvla_fast[train]" in refused[2] and "Traceback" not in refused[2]


@pytest.mark.long
@pytest.mark.slow
def test_every_command_without_lerobot_runs_or_says_what_to_install(saved: Path, tmp_path: Path) -> None:
    """In the environment of `make venv-standalone`, and where LeRobot is hidden."""
    others = [python for python in os.environ.get("SMOLVLA_FAST_PYTHONS", "").split(os.pathsep) if python]
    extras = {"train": "smolvla_fast[train]", "serve": "lerobot[smolvla,async]", "bench": "[bench"}
    for number, python in enumerate([sys.executable, *others]):
        folder = tmp_path / str(number)
        folder.mkdir()
        made = ["verify", "--size", "tiny", "--threads", "1"]
        commands = [demo(saved), made, ["doctor"], *([command] for command in extras)]
        shown, verified, doctor, *refused = without_lerobot(folder, *commands, python=python)
        demonstrated(folder, *shown, python=python)
        assert verified[0] == 0 and "smolvla_fast's own SmolVLA" in verified[1], verified[2]
        assert doctor[0] == 0 and "backend='auto' takes" in doctor[1], doctor[2]
        for (status, _, said), extra in zip(refused, extras.values(), strict=True):
            assert status == 2 and extra in said and "Traceback" not in said, said
