"""Every flag of ``smolvla-fast train``: what lerobot-train reads is read the same, what cannot be is refused by name.

LeRobot's side is its own ``TrainPipelineConfig``, decoded by draccus from the same text, as its parser does.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from support.training_runs import read, refused, resume

from smolvla_fast.cli import main
from smolvla_fast.train import TrainingError
from smolvla_fast.train.flags import LEROBOTS, SETTINGS
from smolvla_fast.train.settings import CHOICES

pytestmark = pytest.mark.training

HOSTILE = (
    "abc", "-1", "0", "0.5", "1e3", "", "null", "true", "nan", ".nan", "-.inf", "[1, 2, 3]", "[", "{a: b}", "{a: b",
    "{a: 1}",
    "99999999999999999999999", "-99999999999999999999999", "1e400", "0,1", "[0,1", "[a, b]", "!include x",
    "!!python/object:x",
    "@x", "é\x00", "2024-01-01", "/proc/x", "[[]]", "- a", "&a [*a]",
)  # fmt: skip
# Text that lerobot-train takes, by the type of the field, in the forms in which it is met.
GOOD = {
    "int": ("3", "1_000", "'7'", "0x10"), "float": ("0.25", "1e-4", "1", "2.5e-06"),
    "bool": ("true", "false", "True", "FALSE", "yes"), "str": ("abc", "'quoted'", "123", "a/b"),
    "int | None": ("3", "null", "~"), "str | None": ("abc", "null", "a/b", "1.0"), "bool | None": ("true", "null"),
    "list[int] | None": ("[0, 2]", "[1]", "null", '["3"]'), "list[str] | None": ("[a, b]", '["a"]', "null"),
    "list[str] | str | None": ("[a, b]", "a.*b", "null"),
    "tuple[int, int] | None": ("[64, 32]", "[1, 1]"), "tuple[float, float]": ("[0.8, 0.95]", '["0.8", 0.9]'),
    "dict[str, str]": ("{a: b}", '{"a": "b"}', "{}"),
    "dict[str, PolicyFeature] | None": ("null", "{}", '{"action": {"type": "ACTION", "shape": [6]}}'),
    "dict[str, NormalizationMode]": ("{STATE: IDENTITY}", '{"ACTION": "MIN_MAX"}'),
    "RTCConfig | None": ("null", "{enabled: false}", '{"execution_horizon": 4}'),
    "RTCAttentionSchedule": ("EXP", "ONES"), "Path": ("x/y", "/tmp/z"), "Path | None": ("x/y", "null"),
}  # fmt: skip
# Text for fields of which their type alone says too little.
ONLY = {
    "dataset.video_backend": ("pyav", "torchcodec", "null"), "policy.attention_mode": ("self_attn",),
    "policy.pad_language_to": ("max_length",), "policy.use_peft": ("false",), "policy.max_period": ("8", "5.5"),
    "policy.use_delta_joint_actions_aloha": ("false",), "policy.device": ("cpu", "null"),
    "dataset.eval_split": ("0.25", "0"),
    "policy.n_action_steps": ("3",), "policy.chunk_size": ("60", "1_000"), "policy.num_expert_layers": ("-1", "4"),
    "policy.empty_cameras": ("2",), "policy.pretrained_path": ("x/y",), "rename_map": ("{a: b}", '{"a": "b"}'),
    "policy.compile_mode": ("default", "reduce-overhead"), "eval_steps": ("0", "-3"), "save_freq": ("10", "-1"),
}  # fmt: skip


def new_run(*flags: str) -> list[str]:
    base = ["--dataset.repo_id=x/y", "--policy.device=cpu", "--policy.pretrained_path=x/y"]
    return [*base, *flags]


def lerobots(flags: list[str]) -> Any:
    """What LeRobot's parser makes of the flags. Raises what it raises."""
    import draccus
    from lerobot.configs.train import TrainPipelineConfig
    from lerobot.policies.smolvla import configuration_smolvla  # noqa: F401  registers the policy

    texts = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    values = {name: draccus.cfgparsing.parse_string(text) for name, text in texts.items()}
    nested = draccus.utils.deflatten({"policy.type": "smolvla", **values})
    return draccus.decode(TrainPipelineConfig, nested)


def value_of(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = getattr(settings, part)
    return settings


def plain(value: Any) -> Any:
    """The same for equal values of LeRobot's classes and of ours."""
    import draccus

    encoded = json.loads(json.dumps(draccus.encode(value), default=str)) if value is not None else None
    return encoded.lower() if isinstance(encoded, str) else encoded


def is_text(name: str) -> bool:
    """Whether all that is typed can be meant."""
    return name in SETTINGS and str(SETTINGS[name].type).startswith(("str", "Path")) and name not in CHOICES


@pytest.mark.parametrize("name", ["output_dir", "dataset.root", "dataset.revision", "policy.vlm_model_name"])
@pytest.mark.parametrize(
    "text", ["2024-05-01", "2024", "2024_05", "1.10", "0x10", "12:30:00", "yes", "[a]", "@b", "a: b"]
)
def test_a_text_is_taken_as_typed_whatever_yaml_makes_of_it(name: str, text: str) -> None:
    assert str(value_of(read(new_run(f"--{name}={text}"))[0], name)) == text


# Known to LeRobot's policy, and written into its files, but not read by its flag.
ALSO = {("policy.resize_imgs_with_padding", "null")}
OWN = (
    "implementation", "fast", "image_cache", "image_cache_dir", "dtype", "gradient_accumulation_steps", "log_with",
)  # fmt: skip
THEIRS = [name for name in SETTINGS if name not in OWN]


@pytest.mark.parametrize("name", THEIRS)
def test_a_flag_reads_what_lerobot_train_reads(name: str) -> None:
    """To the same value, and each form of a value; an equal default would hide that a flag goes nowhere."""
    seen = []
    for text in ONLY.get(name) or GOOD[str(SETTINGS[name].type)]:
        flags = new_run(f"--{name}={text}")
        if name == "policy.chunk_size" or name == "policy.n_action_steps":
            flags.append("--policy.n_action_steps=3")
        if name == "dataset.eval_split" or name == "eval_steps":
            flags.append("--dataset.eval_split=0.25" if name == "eval_steps" else "--eval_steps=0")
        theirs = plain(value_of(lerobots(flags), name))
        ours = plain(value_of(read(flags)[0], name))
        if name in ("save_freq", "log_freq", "eval_steps", "max_eval_samples"):
            theirs = max(0, theirs)  # below 0 is 0: never
        if name == "dataset.video_backend":
            theirs = ours if text == "null" else theirs  # LeRobot's choice is made later here
        assert ours == theirs, text
        seen.append(ours)
    assert len(SETTINGS) > 70 and seen


# Flags of one type are read by the same lines: one of each here, and in make test-full all.
OF_TYPE: dict[str, list[str]] = {}
for name, entry in SETTINGS.items():
    OF_TYPE.setdefault(str(entry.type), []).append(name)
FIRST = {"policy.type", "resume", *(name for names in OF_TYPE.values() for name in names[:1])}
FLAGS = [
    pytest.param(name, marks=() if name in FIRST else pytest.mark.long)
    for name in (*SETTINGS, "policy.type", "resume")
]


@pytest.mark.parametrize("name", FLAGS)
def test_a_hostile_value_is_refused_by_name_or_read(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    refusals = 0
    for text in HOSTILE:
        flags = new_run(f"--{name}={text}")
        try:
            read(flags)
        except TrainingError as error:
            refusals += 1
            assert f"--{name}" in str(error), (text, str(error))
            assert "Traceback" not in str(error) and "<class" not in str(error), str(error)
        else:
            if name not in OWN and (name, text) not in ALSO and not is_text(name):
                lerobots(flags)  # takes it as well
    assert refusals or str(SETTINGS[name].type).startswith(("str", "Path")), (
        "no value of the table was refused"
    )
    assert not list(tmp_path.iterdir())


NEVER = [
    ("--policy.optimizer_betas=[0.9, 2]", "below 1"), ("--policy.optimizer_betas=[nan, 0.9]", "below 1"),
    ("--policy.optimizer_lr=.nan", "finite"), ("--policy.optimizer_lr=0", "above 0"),
    ("--policy.optimizer_eps=-1", "at least 1e-37"), ("--policy.optimizer_eps=0", "at least 1e-37"),
    ("--policy.optimizer_eps=1e-60", "at least 1e-37"), ("--dataset.eval_split=1.5", "below 1"),
    ("--eval_steps=1", "--dataset.eval_split"), ("--batch_size=0", "at least 1"), ("--steps=many", "a whole number"),
    ("--policy.optimizer_lr=fast", "a number"), ("--policy.attention_mode=none", "'cross_attn' or 'self_attn'"),
    ("--policy.path=", "is empty"), ("--policy.path=/no/such/checkpoint", "config.json"),
    ("--policy.push_to_hub=true", "uploads nothing"), ("--config_path=x", "YAML, JSON or TOML"),
    ("--policy.optimizer_weight_decay=.inf", "finite"), ("--policy.scheduler_decay_lr=-1", "at least 0"),
    ("--policy.scheduler_warmup_steps=-1", "at least 0"), ("--tolerance_s=.nan", "finite"), ("--seed=-1", "at least 0"),
    ("--num_workers=-1", "at least 0"), ("--num_workers=1000000", "at most"), ("--policy.chunk_size=0", "at least 1"),
    ("--policy.n_action_steps=51", "--policy.chunk_size"), ("--policy.chunk_size=1000000000", "at most"),
    ("--dataset.episodes=[]", "at least one"), ("--dataset.episodes=[1,1]", "once"),
    ("--dataset.episodes=[-1]", "at least 0"),
    ("--dataset.video_backend=vlc", "pyav"), ("--policy.device=gpu", "'cuda:N'"),
    ("--policy.device=cuda:99", "torch has none"),
    ("--policy.type=act", "lerobot-train"), ("--steps=null", "int"), ("--batch_size=2.0", "a whole number"),
    ("--policy.use_delta_joint_actions_aloha=true", "not implemented"), ("--policy.rtc_config.debug_maxlen=0", "positive"),
    ("--resume=maybe", "true or false"), ("--save_checkpoint=1", "true or false"), ("--rename_map=[a]", "{a: b}"),
    ("--policy.normalization_mapping={STATE: BIG}", "MEAN_STD"), ("--policy.input_features={a: 1}", "type: ACTION"),
]  # fmt: skip


@pytest.mark.parametrize(("flag", "says"), NEVER, ids=[flag for flag, _ in NEVER])
def test_a_value_that_cannot_work_is_refused(flag: str, says: str) -> None:
    with pytest.raises(TrainingError) as error:
        read(new_run(flag))
    assert flag.split("=")[0] in str(error.value) and says in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed=abc"], ["--seed=-1"], ["--policy.device=gpu"], ["--output_dir=/proc/x"], ["--output_dir=FILE"],
        ["--output_dir=FILE/x"], ["--output_dir=a\x00b"], [f"--output_dir={'x' * 5000}"], ["--dataset.episodes=0,1"],
        ["--policy.vlm_model_name=nonsense"], ["--policy.expert_width_multiplier=1e9"],
        ["--policy.max_state_dim=1000000000000"],
        ["--policy.expert_width_multiplier=1e-9"], ["--policy.num_expert_layers=3"], ["--seed", "abc"], ["--seed"],
        ["--sed=1"], ["--policy.lr=1"], ["--env.type=pusht"], ["--peft.r=0"], ["--policy.path=/nowhere"], ["--num_work=1"],
        ["--seed=1", "--seed=x"], ["--config_path=/nowhere.yaml"], ["stray"], ["--resume", "--output_dir=a\x00b"],
        ["--resume", f"--output_dir={'x' * 300}"],
    ],
    ids=lambda flags: flags[0][:40],
)  # fmt: skip
def test_the_command_refuses_before_the_dataset_is_opened(
    flags: list[str], bench_top, tmp_path: Path, capsys, monkeypatch
) -> None:
    """The dataset is not there, so that a command that came so far says so; what it says must be of the flag."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    flags = [flag.replace("FILE", str(tmp_path / "file")) for flag in flags]
    base = [flag for flag in bench_top.flags(tmp_path / "run") if not flag.startswith("--dataset.root")]
    try:
        status = main(["train", *base, "--dataset.root=/no/such/data", *flags])
    except SystemExit as stop:  # argparse's own refusals
        status = stop.code
    message = capsys.readouterr().err
    assert status == 2, message
    assert flags[-1].split("=")[0].lstrip("-") in message, message
    assert (
        "Traceback" not in message
        and "did not foresee" not in message
        and "cannot open the dataset" not in message
    )
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_train_suggests_a_flag_for_a_misspelt_one(capsys) -> None:
    for flag, meant in (
        ("--sed=1", "--seed"),
        ("--policy.optimiser_lr=1", "--policy.optimizer_lr"),
        ("--step=1", "--steps"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["train", flag])
        assert stop.value.code == 2 and f"did you mean {meant}?" in capsys.readouterr().err


def test_both_forms_and_the_last_of_two_flags_hold() -> None:
    settings = read(new_run("--seed", "5", "--steps=7", "--steps", "9", "--rename_map", "{a: b}"))[0]
    assert (settings.seed, settings.steps, settings.rename_map) == (5, 9, {"a": "b"})


def test_every_flag_of_lerobot_train_is_read_or_answered() -> None:
    """Each field of LeRobot's own configuration is a setting here, or stands in the table of what is not."""
    import dataclasses

    from lerobot.configs.default import DatasetConfig, PeftConfig, WandBConfig
    from lerobot.configs.train import TrainPipelineConfig
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

    groups = {"dataset": DatasetConfig, "policy": SmolVLAConfig, "wandb": WandBConfig, "peft": PeftConfig}
    names = [entry.name for entry in dataclasses.fields(TrainPipelineConfig) if entry.name not in groups]
    names += [f"{group}.{entry.name}" for group, kind in groups.items() for entry in dataclasses.fields(kind)]
    assert len(names) > 80
    assert not {*names} - {*SETTINGS, *LEROBOTS, "resume"}


@pytest.mark.parametrize("name", LEROBOTS)
def test_a_flag_for_what_is_not_here_is_refused_unless_it_asks_for_nothing(name: str) -> None:
    values, instead = LEROBOTS[name]
    for value in values or ("x",):
        read(new_run(f"--{name}={json.dumps(value)}"))
    if values is not None:
        with pytest.raises(TrainingError) as error:
            read(new_run(f"--{name}=something"))
        assert f"--{name}=something" in str(error.value) and instead in str(error.value)


def test_a_file_of_settings_is_read_as_lerobot_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "dataset: {repo_id: x/y, episodes: [0, 2]}\npolicy: {type: smolvla, chunk_size: 60, device: cpu}\n"
        "steps: 50\nfast: off\nwandb: {enable: false, project: p}\noutput_dir: out\n"
    )
    settings, checkpoint = read([f"--config_path={path}", "--steps=70", "--policy.n_action_steps=4"])
    assert checkpoint is None and (settings.steps, settings.fast, settings.policy.chunk_size) == (
        70,
        "off",
        60,
    )
    assert settings.dataset.episodes == [0, 2] and settings.policy.n_action_steps == 4
    for text, says in (
        ("steps: many", "--steps=many"), ("wandb: {enable: maybe}", "--wandb.enable=maybe"),
        ("stpes: 3", "did you mean --steps"),
        ("policy: {chunk: 3}", "--policy.chunk"), ("policy: 3", "policy must hold"),
        ("policy:", "policy must hold"),
        ("dataset: me/pick", "dataset must hold names and values, such as dataset: {repo_id: me/pick}"),
        ("[", "YAML"), ("- a", "list"), ("", "NoneType"),
        ("peft: {r: 0}", "--peft.r=0: must be at least 1"), ("peft: 3", "peft must hold"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(TrainingError) as error:
            read([f"--config_path={path}", "--dataset.repo_id=x/y"])
        assert says in str(error.value), text


def test_a_home_folder_is_expanded_in_a_file(finished, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ckpt").symlink_to(finished / "checkpoints" / "last" / "pretrained_model")
    (tmp_path / "run.yaml").write_text(
        "{dataset: {repo_id: x/y, root: ~/data}, policy: {path: ~/ckpt}, output_dir: ~/run}"
    )
    settings = read([f"--config_path={tmp_path / 'run.yaml'}"])[0]
    found = (settings.dataset.root, settings.policy_path, str(settings.output_dir))
    assert found == tuple(str(tmp_path / name) for name in ("data", "ckpt", "run"))


def test_a_train_config_of_lerobot_begins_a_new_run(bench_top, tmp_path: Path) -> None:
    """The file that lerobot-train writes of itself, all its fields in it."""
    from lerobot.configs.train import TrainPipelineConfig

    config = lerobots(new_run("--steps=12", "--rename_map={a: b}", "--policy.repo_id=me/x"))
    assert isinstance(config, TrainPipelineConfig)
    config.optimizer, config.scheduler = (
        config.policy.get_optimizer_preset(),
        config.policy.get_scheduler_preset(),
    )
    config.save_pretrained(tmp_path)
    settings = read([f"--config_path={tmp_path / 'train_config.json'}", f"--output_dir={tmp_path / 'run'}"])[
        0
    ]
    assert (settings.steps, settings.rename_map, settings.policy_path) == (12, {"a": "b"}, "x/y")
    assert read([f"--config_path={tmp_path}", "--steps=13"])[0].steps == 13


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--policy.chunk_size=4", "policy.chunk_size (6 in the checkpoint, 4 asked for)"), ("--seed=7", "seed (1000"),
        ("--batch_size=x", "batch_size (4 in the checkpoint"), ("--num_workers=-1", "--num_workers=-1"),
        ("--policy.path=x", "--policy.path"), ("--eval_steps=2", "cannot be added with --resume"),
        ("--policy.optimizer_betas=[0.8, 0.9]", "policy.optimizer_betas"), ("--policy.device=gpu", "--policy.device=gpu"),
    ],
)  # fmt: skip
def test_a_resumed_run_refuses_by_name(flag: str, says: str, finished, capsys) -> None:
    before = sorted(finished.rglob("*"))
    assert resume(finished, flag) == 2
    assert says in capsys.readouterr().err and sorted(finished.rglob("*")) == before


def test_a_repeated_command_resumes(finished, bench_top, tmp_path: Path) -> None:
    """With the flags the run was begun with, in another writing."""
    folder = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    flags = bench_top.flags(
        folder, "--steps=4", "--save_freq=2", "--log_freq=1", "--policy.optimizer_lr=1e-3"
    )
    settings, checkpoint = read([*flags, "--resume", "--policy.resize_imgs_with_padding=[ 32, 32 ]"])
    assert checkpoint == folder / "checkpoints" / "000004" and settings.policy.optimizer_lr == 0.001


def test_help_names_every_flag() -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = out.getvalue()
    assert all(f"--{name}" in text for name in (*SETTINGS, *LEROBOTS, "policy.path", "resume", "config_path"))


def test_train_accepts_lerobots_usual_flags(bench_top, tmp_path: Path, capsys) -> None:
    checkpoint = tmp_path / "first" / "checkpoints" / "last" / "pretrained_model"
    assert bench_top.command(tmp_path / "first", "--steps=1") == 0
    renamed = "--rename_map={observation.images.front: observation.images.front}"
    assert bench_top.command(tmp_path / "run", "--steps=1", renamed, f"--policy.path={checkpoint}") == 0
    assert "--dataset.episodes=0,1: accepted is a list of whole numbers" in refused(
        bench_top, tmp_path / "other", capsys, "--dataset.episodes=0,1"
    )


def test_the_type_of_a_checkpoint_s_policy_is_taken_if_it_is_smolvla(finished) -> None:
    """LeRobot refuses --policy.type beside --policy.path, whichever it is."""
    path = f"--policy.path={finished / 'checkpoints' / 'last' / 'pretrained_model'}"
    assert read(["--dataset.repo_id=x/y", path, "--policy.type=smolvla"])[0].policy.chunk_size == 6
    with pytest.raises(TrainingError, match="--policy.type=act: this command trains smolvla only"):
        read(["--dataset.repo_id=x/y", path, "--policy.type=act"])


def test_train_config_has_lerobots_fields_alone(bench_top, tmp_path: Path) -> None:
    """With one more `lerobot-train --resume=true` could not read a checkpoint."""
    from lerobot.configs.train import TrainPipelineConfig

    theirs = {each.name for each in fields(TrainPipelineConfig)}
    assert bench_top.settings(tmp_path / "run").to_lerobot().keys() <= theirs
