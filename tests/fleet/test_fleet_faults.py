"""What goes wrong with one client or one replica: a clear error or an answer, and nothing lost for the others."""

from __future__ import annotations

import asyncio
import os
import pickle
import re
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from offline.checkpoints import rel_l2

from fleet.conftest import PATIENCE, WAIT_S, Alone, Client, Fleet, stacked
from fleet.test_fleet_answers import SERVED_EXACTLY, at_once
from fleet.test_messages import ATTACKS, timed


def refusal(call: Any) -> tuple[str, str]:
    """The status and the text of a call that fails."""
    import grpc

    with pytest.raises(grpc.RpcError) as refused:
        call()
    return refused.value.code().name, refused.value.details()


def sends(client: Client, data: bytes) -> Any:
    from lerobot.transport import services_pb2
    from lerobot.transport.utils import send_bytes_in_chunks

    pieces = send_bytes_in_chunks(data, services_pb2.Observation)
    return lambda: client.client.stub.SendObservations(pieces, timeout=PATIENCE)


class Watched:
    """A deployment's handle that notes what its calls raise."""

    def __init__(self, handle: Any) -> None:
        self.handle, self.raised = handle, []

    async def remote(self, *asked: Any) -> Any:
        try:
            return await self.handle.remote(*asked)
        except Exception as error:
            self.raised.append(error)
            raise


@pytest.mark.long
@pytest.mark.slow
def test_a_replica_killed_in_mid_request_is_replaced_and_everyone_answered(
    fleet: Fleet, connect: Any, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.exceptions import RayActorError

    handle = fleet.front.replicas
    watched = Watched(handle)
    monkeypatch.setattr(fleet.front, "replicas", watched)
    clients = [connect(number) for number in range(4)]
    seen = [client.observe() for client in clients]
    wants = [alone.answer(each, 0) for each in seen]
    died = process(handle)

    def work(number: int, client: Client) -> None:
        assert client.send(seen[number])
        if number == 0:
            threading.Timer(WAIT_S / 2, os.kill, (died, signal.SIGKILL)).start()
        assert rel_l2(stacked(client.receive()), wants[number]) <= SERVED_EXACTLY

    at_once(clients, work)
    assert any(isinstance(each, RayActorError) for each in watched.raised), "it was not killed in mid-request"
    assert process(handle) != died


def process(handle: Any) -> int:
    found = re.search(r"process (\d+)", handle.report.remote().result(timeout_s=PATIENCE))
    assert found
    return int(found[1])


def test_an_observation_with_which_a_replica_dies_is_asked_anew_and_in_the_end_given_up(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That Ray puts another in its place is seen above, by make test-full."""
    from ray.exceptions import RayActorError

    from smolvla_fast.fleet import front

    async def dies(*asked: Any) -> Any:
        if len(died) == lives:
            return "a chunk"
        died.append(asked)
        raise RayActorError

    async def at_once(seconds: float) -> None:
        pass

    died: list[Any] = []
    lives = front.TRIES - 1
    one = front.Front(SimpleNamespace(remote=dies), "", None, None, None)
    monkeypatch.setattr(front.asyncio, "sleep", at_once)
    assert asyncio.run(one._ask("an observation")) == "a chunk" and len(died) == lives
    died.clear()
    lives = front.TRIES
    with pytest.raises(front.Refused, match="5 replicas have died"):
        asyncio.run(one._ask("an observation"))
    assert died == [("an observation",)] * front.TRIES


def test_a_client_gone_in_mid_chunk_ends_its_session_alone(fleet: Fleet, connect: Any, alone: Alone) -> None:
    from smolvla_fast.fleet import front

    stays, goes = connect(0), connect(1)
    seen = stays.observe()
    assert stays.send(seen) and goes.send(goes.observe())
    lost = threading.Thread(target=lambda: refusal(goes.receive), daemon=True)
    lost.start()
    time.sleep(WAIT_S / 2)
    assert len(fleet.front.sessions) == 2
    goes.client.channel.close()
    assert rel_l2(stacked(stays.receive()), alone.answer(seen, 0)) <= SERVED_EXACTLY
    lost.join(PATIENCE)
    peer = next(each for each in fleet.front.sessions if fleet.front.sessions[each].answered == 0)
    fleet.front.sessions[peer].seen -= front.IDLE_S
    fleet.front.sweep()
    assert len(fleet.front.sessions) == 1


def test_bad_messages_are_refused_while_others_are_answered(
    fleet: Fleet, connect: Any, alone: Alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where an attack would leave a file
    good, bad = connect(0), connect(1)
    seen: list[Any] = []
    answers: list[Any] = []
    done = threading.Event()

    def robot() -> None:
        while not done.is_set():
            seen.append(good.observe())
            answers.append(good.ask(seen[-1]))

    thread = threading.Thread(target=robot, daemon=True)
    thread.start()
    state = bad.observe()
    no_task = {name: value for name, value in state.items() if name != "task"}
    for attack, make in ATTACKS.items():
        code, text = refusal(sends(bad, make())) if attack != "nothing" else ("INVALID_ARGUMENT", "")
        assert code == "INVALID_ARGUMENT" and "Traceback" not in text, (attack, text)
    assert not (tmp_path / "ran").exists()
    for changed, says in (
        ({**state, "joint0.pos": state["camera1"]}, "joint0.pos of ndarray; accepted is a number"),
        ({"joint0.pos": 1.0, "task": "go"}, "joint1.pos of NoneType"),
        ({**state, "camera1": np.zeros((24, 32), np.uint8)}, "observation.images.camera1 of (24, 32)"),
        # LeRobot would make it as large as the policy's frames: of 3 KB 150 MB, or of more all the memory there is.
        ({**state, "camera1": np.zeros((1, 1, 3000), np.uint8)}, "accepted is a frame [height, width, 3]"),
        ({**state, "camera1": "a picture"}, "observation.images.camera1 of ()"),
    ):
        code, text = refusal(sends(bad, pickle.dumps(timed(changed, timestep=1))))
        assert code == "INVALID_ARGUMENT" and says in text
    for changed, says in (
        ({**state, "joint0.pos": float("nan")}, "accepted are finite numbers"),
        ({**state, "camera1": np.zeros((0, 0, 3), np.uint8)}, "does not fit its features"),
        ({**state, "task": 5}, "finds the task 5; accepted is a text"),
        ({**state, "task": "go" * 5001}, "finds the task 'gogo"),
        (no_task, "finds the task None"),
    ):  # fmt: skip
        assert bad.send(changed)
        code, text = refusal(bad.receive)
        assert code == "INVALID_ARGUMENT" and says in text, text
    # Its session goes on, and so does the other's.
    # What was refused is forgotten: the same joints are answered, though LeRobot's rules drop what is like the last.
    assert bad.send(state, must_go=False)
    assert rel_l2(stacked(bad.receive()), alone.answer(state, 0)) <= SERVED_EXACTLY
    done.set()
    thread.join(PATIENCE)
    assert len(answers) > 1
    for turn, (one, answer) in enumerate(zip(seen, answers, strict=True)):
        assert rel_l2(stacked(answer), alone.answer(one, turn)) <= SERVED_EXACTLY


def test_an_observation_that_never_ends_is_cut_off(
    fleet: Fleet, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lerobot.transport import services_pb2
    from lerobot.transport.utils import TransferState

    from smolvla_fast.fleet import front

    client = connect()
    piece = services_pb2.Observation(transfer_state=TransferState.TRANSFER_MIDDLE, data=b"x" * 2**20)
    monkeypatch.setattr(front, "MAX_OBSERVATION", 3 * 2**20)
    assert refusal(lambda: client.client.stub.SendObservations(iter([piece] * 8)))[0] == "RESOURCE_EXHAUSTED"
    assert "last piece" in refusal(lambda: client.client.stub.SendObservations(iter([piece])))[1]
    monkeypatch.setattr(front, "RECEIVE_S", 0.2)
    hold = threading.Event()

    def slow() -> Any:
        yield piece
        hold.wait(PATIENCE)

    try:
        code, text = refusal(lambda: client.client.stub.SendObservations(slow()))
    finally:
        hold.set()
    assert code == "ABORTED" and "0.2 s" in text


def test_two_clients_on_one_connection_are_never_mixed_up(fleet: Fleet, connect: Any) -> None:
    first, second = connect(0), connect(1, started=False)
    second.client.stub = first.client.stub
    assert not second.client.start()  # LeRobot's client logs the error
    code, text = refusal(lambda: second.client.stub.Ready(empty()))
    assert code == "ALREADY_EXISTS" and "a process each" in text
    assert first.ask(first.observe())


def empty() -> Any:
    from lerobot.transport import services_pb2

    return services_pb2.Empty()


def test_a_call_out_of_order_says_what_comes_first(fleet: Fleet, connect: Any) -> None:
    client = connect(started=False)
    for call in (lambda: client.client.stub.GetActions(empty()), sends(client, pickle.dumps(timed()))):
        code, text = refusal(call)
        assert code == "FAILED_PRECONDITION" and "SendPolicyInstructions" in text


def test_instructions_for_another_policy_are_refused(fleet: Fleet, connect: Any) -> None:
    from lerobot.transport import services_pb2

    client = connect(started=False, path="lerobot/another")
    client.client.stub.Ready(empty())
    wanted = client.client.policy_config

    def asks(**changed: Any) -> tuple[str, str]:
        config = pickle.dumps(type(wanted)(**{**vars(wanted), **changed}))
        return refusal(
            lambda: client.client.stub.SendPolicyInstructions(services_pb2.PolicySetup(data=config))
        )

    own = dict(pretrained_name_or_path=str(fleet.checkpoint.path))
    features = wanted.lerobot_features

    def named(names: Any) -> dict[str, Any]:
        return {**features, "observation.state": {**features["observation.state"], "names": names}}

    another = {
        "observation.state": features["observation.state"],
        "observation.images.wrist": {"dtype": "image"},
    }
    for changed, says in (
        ({}, "served is smolvla"),
        ({**own, "actions_per_chunk": 0}, ", 0 actions; accepted"),
        ({**own, "policy_type": "act"}, "asks for act"),
        ({**own, "rename_map": {"a": "b"}}, "names mapped by"),
        *(
            ({**own, "lerobot_features": named(names)}, "accepted are 6 names")
            for names in (["joint0.pos"], 6, [["joint0.pos"]] * 6)
        ),
        ({**own, "lerobot_features": another}, "observation.images.wrist"),
    ):
        code, text = asks(**changed)
        assert code == "INVALID_ARGUMENT" and says in text, text
