"""Many of LeRobot's clients at once: everyone gets the answer to its own observation, in batches or not."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from offline.checkpoints import rel_l2

from fleet.conftest import PATIENCE, Alone, Client, Fleet, eventually, metrics, stacked

SERVED_EXACTLY = (
    1e-5  # fp32 sums in another order: the engine's beside stock's, a batch's beside one observation's
)


def at_once(clients: list[Client], work: Any) -> None:
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number, clients[number])
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(clients))]
    for each in threads:
        each.start()
    for each in threads:
        each.join(PATIENCE)
    assert not failures, failures
    assert not any(each.is_alive() for each in threads)


@pytest.mark.parametrize("count", [1, 4, 16])
def test_each_client_gets_the_single_clients_answer(
    count: int, fleet: Fleet, connect: Any, alone: Alone
) -> None:
    clients = [connect(number) for number in range(count)]
    seen: list[list[Any]] = [[] for _ in clients]
    got: list[list[Any]] = [[] for _ in clients]

    def work(number: int, client: Client) -> None:
        for _ in range(3):
            seen[number].append(client.observe())
            got[number].append(client.ask(seen[number][-1]))

    at_once(clients, work)
    wants = [[alone.answer(each, turn) for turn, each in enumerate(mine)] for mine in seen]
    for number in range(count):
        for turn in range(3):
            mine = stacked(got[number][turn])
            assert [each.get_timestep() for each in got[number][turn]] == list(range(turn + 1, turn + 9))
            assert rel_l2(mine, wants[number][turn]) <= SERVED_EXACTLY
            # Another client's answer is a hundred times farther away: nobody has got one.
            others = [rel_l2(mine, wants[other][turn]) for other in range(count) if other != number]
            assert not others or min(others) > 100 * SERVED_EXACTLY


def test_metrics_name_chunks_batches_and_waits(fleet: Fleet, connect: Any) -> None:
    """Batches above one have happened, says Ray's own count of them; ours say who computed the chunks."""
    clients = [connect(number) for number in range(8)]
    at_once(clients, lambda _, client: client.ask(client.observe()))

    def metric(*asked: str) -> float:
        return sum(metrics(fleet.metrics, *asked))

    def counted() -> bool:
        return (
            metric("ray_smolvla_fast_chunks_total", 'served_by="engine"') >= 8
            and metric("ray_serve_batch_wait_time_ms_count") > 0
            # Every batch is counted in the last bucket, those of one observation in the first.
            and metric("ray_serve_actual_batch_size_bucket", 'le="+Inf"')
            > metric("ray_serve_actual_batch_size_bucket", 'le="1.0"')
        )

    eventually(counted)
    assert metric("ray_smolvla_fast_chunks_total", 'served_by="stock"') == 0


def test_lerobots_control_loop_drives_a_robot(fleet: Fleet, connect: Any) -> None:
    """The client's own two threads, unchanged: a robot receives chunks and sends observations until it is stopped."""
    client = connect().client
    receiver = threading.Thread(target=client.receive_actions, daemon=True)
    control = threading.Thread(target=client.control_loop, args=("pick up the red cube",), daemon=True)
    receiver.start(), control.start()
    eventually(lambda: len(client.robot.sent) > 12)  # more than one chunk of 8
    client.shutdown_event.set()
    receiver.join(PATIENCE), control.join(PATIENCE)
    assert not receiver.is_alive() and not control.is_alive()


def test_a_flood_leaves_the_latest_observation(fleet: Fleet, connect: Any, alone: Alone) -> None:
    client = connect()
    seen = [client.observe() for _ in range(12)]
    assert all(client.send(each) for each in seen)
    answer = client.receive()
    assert (
        answer[0].get_timestep() == 12
        and rel_l2(stacked(answer), alone.answer(seen[-1], 0)) <= SERVED_EXACTLY
    )
    (session,) = fleet.front.sessions.values()
    assert session.observation_queue.empty()


def test_lerobots_rules_drop_what_is_like_the_last_observation(fleet: Fleet, connect: Any) -> None:
    client = connect()
    seen = client.observe()
    client.ask(seen)
    client.send(seen, must_go=False)
    (session,) = fleet.front.sessions.values()
    assert session.observation_queue.empty()
    client.send({**seen, "joint0.pos": 5.0}, must_go=False)
    assert client.receive()[0].get_timestep() == client.step


def test_the_noise_is_each_sessions_own_without_a_seed(fleet: Fleet, connect: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(fleet.front, "seed", None)
    first, second = connect(), connect()
    seen = first.observe()
    one, other = stacked(first.ask(seen)), stacked(second.ask(seen))
    assert rel_l2(one, other) > 100 * SERVED_EXACTLY
