"""LeRobot's own callers and the libraries around it, run on a patched policy beside an unpatched twin.

Tier ``exact`` has to give the twin's bits wherever the caller's own computation does not depend on time. What a caller
makes of the chunks is LeRobot's own code in both runs; ``status`` says that the engine, and not stock, has served.
"""

from __future__ import annotations

import copy
import functools
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import smolvla_fast
from smolvla_fast.testing.policies import make_noise, make_observation, make_policy

pytest.importorskip("lerobot.rollout", reason="the rollout engines came with LeRobot 0.6")
pytest.importorskip("datasets", reason="LeRobot's callers need lerobot[dataset]")

from offline.checkpoints import TASK, Checkpoint, copied, fix_noise, rel_l2

PATIENCE = 120  # seconds: a bound for what takes less than one on an idle machine
SERVED_EXACTLY = 1e-5  # fp32 sums in another order


def _pair(checkpoint: Checkpoint, precision: str = "exact") -> tuple[Any, Any]:
    """A stock policy and a patched one of the same weights."""
    stock = checkpoint.load()
    return stock, smolvla_fast.patch(copy.deepcopy(stock), precision=precision)


def _chunk(policy: Any, observation: dict[str, Any], noise: Tensor) -> Tensor:
    return policy.predict_action_chunk(copied(observation), noise=noise)


def _all_fast(policy: Any, calls: int | None = None) -> None:
    now = smolvla_fast.status(policy)
    assert now.active and now.calls_stock == 0, now.last_fallback
    assert now.calls_fast == calls if calls is not None else now.calls_fast > 0


# Real-time chunking ----------------------------------------------------------------------------------------------------


@pytest.mark.check(45, 46, 49)
def test_rtc_engine_in_its_thread_with_resets_from_another(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """LeRobot's RTC engine drives the patched policy in its daemon thread while this one takes actions and resets.

    Every chunk that it asked for, guided ones among them, is asked of the stock twin again: equal bits.
    """
    from lerobot.policies.rtc.configuration_rtc import RTCConfig
    from lerobot.rollout.inference.rtc import RTCInferenceEngine, supports_rtc_inference
    from lerobot.rollout.robot_wrapper import ThreadSafeRobot
    from lerobot.utils.feature_utils import hw_to_dataset_features
    from offline.lerobot_robot_tiny import TinyRobot, TinyRobotConfig

    stock, fast = _pair(checkpoint)
    noise = make_noise(fast)
    for policy in (stock, fast):
        policy.config.rtc_config = RTCConfig(execution_horizon=6)
        policy.init_rtc_processor()
        fix_noise(policy, noise)
    assert supports_rtc_inference(fast)
    asked: list[tuple[dict[str, Any], dict[str, Any], Tensor, int]] = []
    predict = fast.predict_action_chunk

    @functools.wraps(predict)
    def remember(batch: dict[str, Any], **kwargs: Any) -> Tensor:
        given, chunk = copied(batch), predict(batch, **kwargs)
        asked.append((given, copied(kwargs), chunk.clone(), threading.get_ident()))
        return chunk

    fast.predict_action_chunk = remember
    robot = ThreadSafeRobot(TinyRobot(TinyRobotConfig(calibration_dir=tmp_path)))
    preprocess, postprocess = checkpoint.pipelines(fast)
    engine = RTCInferenceEngine(
        fast, preprocess, postprocess, robot, fast.config.rtc_config,
        hw_to_dataset_features(robot.observation_features, "observation"), TASK, fps=2.0, device="cpu",
        rtc_queue_threshold=5,
    )  # fmt: skip
    engine.start()
    try:
        engine.resume()
        taken, deadline = 0, time.monotonic() + PATIENCE
        while len(asked) < 12 and time.monotonic() < deadline and not engine.failed:
            engine.notify_observation(robot.get_observation())
            taken += engine.get_action(None) is not None
            if taken % 7 == 6:
                engine.reset()
            time.sleep(0.002)
    finally:
        engine.stop()
    assert not engine.failed and len(asked) >= 12 and taken > 0
    guided = [kwargs for _, kwargs, _, _ in asked if kwargs["prev_chunk_left_over"] is not None]
    assert guided and {ident for *_, ident in asked} - {threading.get_ident()} == {asked[0][3]}
    for given, kwargs, chunk, _ in asked:
        assert torch.equal(stock.predict_action_chunk(given, **kwargs), chunk)
    _all_fast(fast, len(asked))


# Evaluation ------------------------------------------------------------------------------------------------------------


@pytest.mark.check(42)
def test_eval_rollouts_of_one_eight_and_a_ragged_rest(checkpoint: Checkpoint) -> None:
    """``lerobot_eval``'s own rollout, over 1, then 8, then 3 environments, each with stock's actions to the bit."""
    import gymnasium as gym
    from lerobot.envs.configs import EnvConfig
    from lerobot.scripts.lerobot_eval import rollout
    from offline.lerobot_env_tiny import TinyEnv, TinyEnvConfig

    identity = EnvConfig.get_env_processors(TinyEnvConfig())
    taken: list[list[Tensor]] = []
    stock, fast = _pair(checkpoint)
    for policy in (stock, fast):
        actions = []
        torch.manual_seed(5)
        for count in (1, 8, 3, 1):
            environment = gym.vector.SyncVectorEnv([functools.partial(TinyEnv, 12)] * count)
            result = rollout(
                environment, policy, *identity, *checkpoint.pipelines(policy), seeds=list(range(count))
            )
            assert result["action"].shape == (count, 12, 6)
            actions.append(result["action"])
        taken.append(actions)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*taken, strict=True))
    _all_fast(fast, 8)  # 12 steps are two chunks of 10 actions, four times


@pytest.mark.check(47)
def test_parallel_tasks_share_one_policy(checkpoint: Checkpoint) -> None:
    """``max_parallel_tasks=3``: LeRobot's threads share one queue, so who takes which action is chance, with stock as well.

    Every chunk that any of them computed is the twin's for the same observation, and every action is one of those chunks'.
    """
    import gymnasium as gym
    from lerobot.envs.configs import EnvConfig
    from lerobot.scripts.lerobot_eval import eval_policy_all
    from offline.lerobot_env_tiny import TinyEnv, TinyEnvConfig

    stock, fast = _pair(checkpoint)
    noise = make_noise(fast)
    for policy in (stock, fast):
        fix_noise(policy, noise)
    computed: list[tuple[dict[str, Any], Tensor, int]] = []
    taken: list[Tensor] = []
    compute, take = fast._get_action_chunk, fast.select_action

    def computes(batch: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        given, chunk = copied(batch), compute(batch, *args, **kwargs)
        computed.append((given, chunk.clone(), threading.get_ident()))
        return chunk

    def takes(*args: Any, **kwargs: Any) -> Tensor:
        action = take(*args, **kwargs)
        taken.append(action.clone())
        return action

    fast._get_action_chunk, fast.select_action = computes, takes
    tasks = {i: gym.vector.SyncVectorEnv([functools.partial(TinyEnv, 12)]) for i in range(3)}
    before, after = EnvConfig.get_env_processors(TinyEnvConfig())
    preprocess, postprocess = checkpoint.pipelines(fast)
    info = eval_policy_all(
        {"tiny": tasks}, fast, before, after, preprocess, postprocess, n_episodes=1, start_seed=0,
        max_parallel_tasks=3,
    )  # fmt: skip
    assert info["overall"]["n_episodes"] == 3 and np.isfinite(info["overall"]["avg_sum_reward"])
    assert {ident for *_, ident in computed} - {threading.get_ident()}
    for given, chunk, _ in computed:
        assert torch.equal(chunk, stock._get_action_chunk(given))
    rows = torch.cat([chunk[0] for _, chunk, _ in computed])
    assert len(taken) == 3 * 12 and all((rows == action).all(dim=1).any() for action in taken)
    _all_fast(fast, len(computed))


# The policy server -----------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """LeRobot's policy server as its ``serve`` starts it, four workers, on a free port; and a client's stub."""
    grpc = pytest.importorskip("grpc", reason="LeRobot's policy server needs grpcio")
    monkeypatch.chdir(tmp_path)  # its module writes a log where it stands when it is imported
    from lerobot.async_inference.configs import PolicyServerConfig
    from lerobot.async_inference.policy_server import PolicyServer
    from lerobot.transport import services_pb2_grpc

    served = PolicyServer(PolicyServerConfig(inference_latency=0.0, obs_queue_timeout=PATIENCE))
    running = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    services_pb2_grpc.add_AsyncInferenceServicer_to_server(served, running)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    try:
        yield served, services_pb2_grpc.AsyncInferenceStub(channel)
    finally:
        channel.close()
        running.stop(grace=1).wait(PATIENCE)


def one_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
    lock = threading.Lock()

    def call(*args: Any) -> Any:
        with lock:
            return function(*args)

    return call


@pytest.mark.check(45, 47)
def test_policy_server_and_its_four_workers(server: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Four clients at once: the chunk that each observation gets is the twin's, whichever worker computes it."""
    from lerobot.async_inference.helpers import (
        RemotePolicyConfig,
        TimedObservation,
        map_robot_keys_to_lerobot_features,
        raw_observation_to_observation,
    )
    from lerobot.transport import services_pb2
    from lerobot.transport.utils import send_bytes_in_chunks
    from offline.lerobot_robot_tiny import TinyRobot, TinyRobotConfig

    served, stub = server
    robot = TinyRobot(TinyRobotConfig(calibration_dir=tmp_path))
    features = map_robot_keys_to_lerobot_features(robot)
    wanted = RemotePolicyConfig("smolvla", str(checkpoint.path), features, 10)
    stub.Ready(services_pb2.Empty(), timeout=PATIENCE)
    stub.SendPolicyInstructions(services_pb2.PolicySetup(data=pickle.dumps(wanted)), timeout=PATIENCE)
    stock = copy.deepcopy(served.policy)
    noise = make_noise(stock)
    for policy in (stock, smolvla_fast.patch(served.policy, precision="exact")):
        fix_noise(policy, noise)
    workers: set[int] = set()
    predict = served.policy.predict_action_chunk

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        workers.add(threading.get_ident())
        return predict(*args, **kwargs)

    served.policy.predict_action_chunk = noted
    # LeRobot's processor steps keep the transition under way as an attribute (ProcessorStep._current_transition) and are not
    # made for several threads. One at a time there: the policy, which is judged here, is called by all at once.
    served.preprocessor, served.postprocessor = map(
        one_at_a_time, (served.preprocessor, served.postprocessor)
    )
    observations = [{**robot.get_observation(), "task": TASK} for _ in range(12)]
    answers: dict[int, list[Any]] = {}
    failures: list[BaseException] = []

    def client(first: int) -> None:
        try:
            for step in range(first, len(observations), 4):
                seen = TimedObservation(float(step), step, observations[step], must_go=True)
                message = send_bytes_in_chunks(pickle.dumps(seen), services_pb2.Observation)
                stub.SendObservations(message, timeout=PATIENCE)
                actions = pickle.loads(stub.GetActions(services_pb2.Empty(), timeout=2 * PATIENCE).data)
                answers[actions[0].get_timestep()] = actions
        except BaseException as failure:
            failures.append(failure)

    # The server holds one observation and drops an older one, so a client may wait for one that never comes: one more
    # observation at a time until everyone has been answered.
    clients = [threading.Thread(target=client, args=(i,), daemon=True) for i in range(4)]
    for each in clients:
        each.start()
    spare = len(observations)
    deadline = time.monotonic() + PATIENCE
    while any(each.is_alive() for each in clients) and time.monotonic() < deadline:
        time.sleep(0.05)
        if served.observation_queue.empty():
            observations.append({**robot.get_observation(), "task": TASK})
            seen = TimedObservation(float(spare), spare, observations[spare], must_go=True)
            message = send_bytes_in_chunks(pickle.dumps(seen), services_pb2.Observation)
            stub.SendObservations(message, timeout=PATIENCE)
            spare += 1
    assert not failures and not any(each.is_alive() for each in clients)
    assert len(answers) >= 8 and len(workers) > 1
    for step, actions in answers.items():
        batch = raw_observation_to_observation(observations[step], features, stock.config.image_features)
        chunk = stock.predict_action_chunk(served.preprocessor(batch))
        want = torch.cat([served.postprocessor(chunk[:, i]) for i in range(10)])
        assert torch.equal(torch.stack([action.get_action() for action in actions]), want), step
    _all_fast(served.policy)


# Training, adapters, compilers -----------------------------------------------------------------------------------------


def _training_batch(policy: Any, seed: int) -> dict[str, Tensor]:
    policy = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    batch = make_observation(policy, batch=2, seed=seed)
    size = (2, policy.config.chunk_size, policy.config.action_feature.shape[0])
    return {**batch, "action": torch.randn(size, generator=torch.Generator().manual_seed(seed))}


def _train(policy: Any, steps: int = 2) -> list[float]:
    """Steps as ``lerobot_train`` takes them, through accelerate; returns the losses."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    prepared, optimizer = accelerator.prepare(policy, torch.optim.AdamW(trained, lr=1e-2))
    prepared.train()
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        with accelerator.autocast():
            loss, _ = prepared(_training_batch(policy, step))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 10.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert accelerator.unwrap_model(prepared) is policy
    policy.eval()
    return losses


@pytest.mark.check(37, 40)
@pytest.mark.training
def test_training_through_accelerate(checkpoint: Checkpoint) -> None:
    """Losses and the chunk afterwards are the twin's bits, and the chunk is the engine's."""
    stock, fast = _pair(checkpoint)
    observation, noise = make_observation(stock), make_noise(stock)
    before = _chunk(fast, observation, noise)
    assert _train(fast) == _train(stock)
    after = _chunk(fast, observation, noise)
    assert torch.equal(after, _chunk(stock, observation, noise)) and not torch.equal(after, before)
    _all_fast(fast, 2)


@pytest.mark.check(17)
def test_lora_as_lerobot_wraps_it(checkpoint: Checkpoint) -> None:
    """Unmerged: stock's bits, with a receipt. Trained, then merged: the engine, within what merging itself reorders."""
    pytest.importorskip("peft")
    stock, fast = _pair(checkpoint, "fp32")
    wrapped = []
    for policy in (stock, fast):
        policy.config.pretrained_path = checkpoint.path
        torch.manual_seed(0)
        overrides = {"method_type": "LORA", "r": 2, "init_type": False}
        wrapped.append(policy.wrap_with_peft(peft_cli_overrides=overrides))
    observation, noise = make_observation(stock), make_noise(stock)
    assert _train(wrapped[0]) == _train(wrapped[1])
    adapted = _chunk(wrapped[1], observation, noise)
    assert torch.equal(adapted, _chunk(wrapped[0], observation, noise))
    now = smolvla_fast.status(wrapped[1])
    assert not now.active and now.calls_stock == 1
    assert "lora" in str(now.last_fallback) and "policy.merge_and_unload()" in str(now.last_fallback)
    merged = wrapped[1].merge_and_unload()
    assert rel_l2(_chunk(merged, observation, noise), adapted) <= SERVED_EXACTLY
    now = smolvla_fast.status(merged)
    assert now.active and (now.calls_fast, now.calls_stock) == (1, 1)


@pytest.mark.check(38)
def test_weights_swapped_for_their_average_and_back(checkpoint: Checkpoint) -> None:
    """As trainers that keep an average of the weights (EMA) do around an evaluation; LeRobot's 0.6.1 keeps none.
    ``param.data.copy_`` moves no version counter."""
    stock, fast = _pair(checkpoint)
    average = copy.deepcopy(stock)
    for parameter in average.parameters():
        parameter.data.mul_(1.05)
    observation, noise = make_observation(stock), make_noise(stock)
    live, kept = _chunk(fast, observation, noise), copy.deepcopy(stock)
    for source in (average, kept):
        for mine, theirs in zip(fast.parameters(), source.parameters(), strict=True):
            mine.data.copy_(theirs.data)
        assert torch.equal(_chunk(fast, observation, noise), _chunk(source, observation, noise))
        assert torch.equal(_chunk(fast, observation, noise), live) is (source is kept)
    _all_fast(fast, 5)


@pytest.mark.check(52)
@pytest.mark.slow
def test_compiled_predict_action_chunk() -> None:
    """As the rollout's ``use_torch_compile`` installs it: the engine below is not traced through, and still serves."""
    stock = make_policy("tiny", num_steps=1, cameras=1)
    fast = smolvla_fast.patch(copy.deepcopy(stock), precision="exact")
    fast.predict_action_chunk = torch.compile(fast.predict_action_chunk, backend="eager")
    try:
        for seed in (0, 1):
            observation, noise = make_observation(stock, seed=seed), make_noise(stock, seed=seed)
            assert torch.equal(_chunk(fast, observation, noise), _chunk(stock, observation, noise))
        _all_fast(fast, 2)
    finally:
        torch._dynamo.reset()
