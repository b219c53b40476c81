"""LeRobot's policy server for many clients: its gRPC protocol in front, a deployment of Ray Serve behind it."""

from __future__ import annotations

import asyncio
import secrets
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.transport.utils import TransferState
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from .messages import MAX_OBSERVATION, Refused, read_observation
from .replica import Answer
from .session import Session

RECEIVE_S = 10.0
"""How long an observation may take to arrive."""
ANSWER_S = 120.0
"""How long a chunk may take: a batch on a CPU, or the start of another replica where one has died."""
TRIES = 5
"""So many replicas may die with an observation in them before it is taken to be the cause."""
IDLE_S = 60.0
"""A client that has been silent for so long is gone."""
MAX_SESSIONS = 64

OPTIONS = {
    "grpc.so_reuseport": 0,  # a port that another server has is an error, not shared
    "grpc.keepalive_time_ms": 10_000,  # finds a robot that lost its network without a goodbye
    "grpc.keepalive_timeout_ms": 5_000,
}


def _call(method: Callable[..., Any]) -> Callable[..., Any]:
    """A call of LeRobot's protocol. What it refuses is the call's status, with the reason."""

    async def call(self: Front, request: Any, context: Any) -> Any:
        try:
            return await method(self, request, context)
        except Refused as error:
            reason = f"smolvla_fast: {method.__name__} {error}"[:1000]
            await asyncio.sleep(0.05)  # LeRobot's client asks again at once
            await context.abort(grpc.StatusCode[error.code], reason)

    return call


class Front(services_pb2_grpc.AsyncInferenceServicer):
    """LeRobot's four calls, for clients that are known by their connection.

    replicas   handle of a deployment of ``Replica``      path, config  of the policy that it holds
    server     LeRobot's ``PolicyServerConfig``           seed          of every client's noise; None: each one's is drawn
    """

    def __init__(self, replicas: Any, path: str, config: Any, server: Any, seed: int | None) -> None:
        self.replicas, self.path, self.config, self.server, self.seed = replicas, path, config, server, seed
        self.sessions: dict[str, Session] = {}

    @_call
    async def Ready(self, request: Any, context: Any) -> Any:
        if context.peer() in self.sessions:
            # Nothing in LeRobot's messages says which of two clients has sent one.
            why = "comes from a connection that has a client; stop that first, or run two in a process each"
            raise Refused(why, "ALREADY_EXISTS")
        if len(self.sessions) >= MAX_SESSIONS:
            raise Refused(f"finds {MAX_SESSIONS} clients connected, which is the most", "RESOURCE_EXHAUSTED")
        seed = secrets.randbits(32) if self.seed is None else self.seed
        self.sessions[context.peer()] = Session(self.server, self.path, self.config, seed)
        return services_pb2.Empty()

    @_call
    async def SendPolicyInstructions(self, request: Any, context: Any) -> Any:
        await asyncio.to_thread(self._session(context).instruct, request.data)
        return services_pb2.Empty()

    @_call
    async def SendObservations(self, request_iterator: Any, context: Any) -> Any:
        session = self._session(context, instructed=True)
        if session.receiving.locked():
            raise Refused("comes before the last one has arrived", "RESOURCE_EXHAUSTED")
        async with session.receiving:
            try:
                data = await asyncio.wait_for(_received(request_iterator), RECEIVE_S)
            except asyncio.TimeoutError as error:
                raise Refused(f"takes more than {RECEIVE_S:g} s to arrive", "ABORTED") from error
            # Copying frames takes milliseconds, in which the others' messages are read.
            session.offer(await asyncio.to_thread(read_observation, data))
        return services_pb2.Empty()

    @_call
    async def GetActions(self, request: Any, context: Any) -> Any:
        session = self._session(context, instructed=True)
        # A client that is gone cancels this task, and with it what Ray computes.
        async with session.answering:
            return await self._answer(session)

    async def _answer(self, session: Session) -> Any:
        try:
            await asyncio.wait_for(session.arrived.wait(), self.server.obs_queue_timeout)
        except asyncio.TimeoutError:
            return services_pb2.Actions()  # LeRobot's "no observation yet"
        began = time.monotonic()
        try:
            with session.taking() as observation:
                asked = await asyncio.to_thread(session.prepare, observation)
                answer = await asyncio.wait_for(self._ask(*asked), ANSWER_S)
                if isinstance(answer, str):
                    raise Refused(f"finds an observation on which the policy fails: {answer}", "INTERNAL")
        except (asyncio.TimeoutError, DeploymentUnavailableError) as error:
            raise Refused("has no answer of a replica; ask again", "UNAVAILABLE") from error
        rest = began + self.server.inference_latency - time.monotonic()
        await asyncio.sleep(max(0.0, rest))  # as LeRobot's server
        session.seen = time.monotonic()
        return services_pb2.Actions(data=session.pack(observation, answer))

    async def _ask(self, *asked: Any) -> Answer:
        """Asks again where a replica has died meanwhile: the seed makes it the same chunk."""
        for tried in range(TRIES):
            try:
                return await self.replicas.remote(*asked)
            except RayActorError:
                await asyncio.sleep(0.1 * 2**tried)
        raise Refused(f"finds an observation with which {TRIES} replicas have died", "INTERNAL")

    def _session(self, context: Any, instructed: bool = False) -> Session:
        session = self.sessions.get(context.peer())
        if session is None or (instructed and session.lerobot_features is None):
            why = "needs Ready and SendPolicyInstructions before it; where a connection was lost, start the client anew"
            raise Refused(why, "FAILED_PRECONDITION")
        session.seen = time.monotonic()
        return session

    def sweep(self) -> None:
        """Ends the sessions of clients that are gone between two calls."""
        silent, known = time.monotonic() - IDLE_S, self.sessions.items()
        self.sessions = {peer: each for peer, each in known if each.answering.locked() or each.seen >= silent}


async def _received(messages: Any) -> bytes:
    """The bytes of one observation, which LeRobot's clients send in pieces. Raises ``Refused`` once they are too many."""
    found = bytearray()
    async for each in messages:
        found += each.data
        if len(found) > MAX_OBSERVATION:
            raise Refused(f"has more than {MAX_OBSERVATION} bytes, the most accepted", "RESOURCE_EXHAUSTED")
        if each.transfer_state == TransferState.TRANSFER_END:
            return bytes(found)
    raise Refused("ends before its last piece")


async def listen(front: Front, address: str, ready: Callable[[int], Any]) -> None:
    """Serves until this task is cancelled. ``ready(port)`` is called once clients can connect."""
    server = grpc.aio.server(options=[*OPTIONS.items()])
    services_pb2_grpc.add_AsyncInferenceServicer_to_server(front, server)
    port = server.add_insecure_port(address)
    await server.start()
    try:
        ready(port)
        while True:
            await asyncio.sleep(IDLE_S / 4)
            front.sweep()
    finally:
        await server.stop(grace=1)


def serve(front: Front, address: str, ready: Callable[[int], Any]) -> None:
    """``listen`` until this process is interrupted or asked to end."""
    # Not asyncio.run, which closes the loop: gRPC's own thread then still calls it.
    loop = asyncio.new_event_loop()
    task = loop.create_task(listen(front, address, ready))
    for stop in (signal.SIGINT, signal.SIGTERM):  # the next one is not caught, and ends what has not ended
        ends = lambda stop=stop: loop.remove_signal_handler(stop) and task.cancel()  # noqa: E731
        loop.add_signal_handler(stop, ends)
    with suppress(asyncio.CancelledError):
        loop.run_until_complete(task)
