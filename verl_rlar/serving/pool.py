# SPDX-License-Identifier: Apache-2.0
"""`Pool`: keeps the replicas of several reward models running, and sends each call to the least loaded one.

The life of a replica: it is started, must answer conversations whose scores are known (golden scores), is used,
watched, and started again when it dies, hangs, or forgets what it knew. Golden scores are those in the `ServedModel`,
or else what the model's first replica answered.

Guarantees: see `RewardModelPool`. Beyond it: a replica is used only after its golden scores were right, and they are
asked again after every wake and every ``golden_s``; one whose golden scores are wrong is started again once and then
taken out; a call never waits longer than its deadline, for room in the queue, for a replica that is being replaced, or
for its answer; one that is being replaced costs its callers a `ConnectionError`, and the next try waits for its
successor; where a server takes up another model's weights, nobody scores by it any more, and that model's golden scores
are known and must be right afterwards; leaving the context ends every server.

Not covered: other nodes. A pool serves the node that it is on; where there are several, each has its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from verl_rlar.config import ServingConfig
from verl_rlar.errors import ToolError, ToolTimeout, ToolUnavailable
from verl_rlar.serving.base import Conversation, Golden, How, Replica, Scored, ServedModel, WrongGolden
from verl_rlar.serving.placing import GIB, Need, machine_memory, place, shape
from verl_rlar.serving.transformers import TransformersReplica
from verl_rlar.serving.vllm import AddressReplica, VllmReplica
from verl_rlar.types import Message

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

CHUNK = 16
"""Most conversations in one call to a replica."""
RESTART_WINDOW_S = 600.0
"""Time over which restarts are counted."""
BACKOFF_S = 0.2
"""Pause before a second restart, in seconds; doubled for each further one."""
MOST_BACKOFF_S = 15.0
CPU = "main memory"
"""Name of the device that is no accelerator."""

GOLDEN_CONVERSATIONS: tuple[Conversation, ...] = tuple(
    (Message(role="user", content=prompt), Message(role="assistant", content=response))
    for prompt, response in (
        ("What is the capital of France?", "The capital of France is Paris."),
        ("Name three primary colours.", "Banana."),
        (
            "Write one sentence about the sea.",
            "The sea was calm that morning, and far out a single white sail stood against the grey of the sky.",
        ),
    )
)
"""What a model whose golden scores are not known is asked."""


@dataclass(frozen=True, kw_only=True)
class ReplicaState:
    """What there is to know of a replica."""

    model: str
    """`ServedModel.name`."""
    pid: int | None
    """None: not running, or somebody else's."""
    ready: bool
    load: int
    """Conversations that it has at the moment."""
    scored: int
    """Conversations that it has scored so far, restarts included."""
    restarts: int
    error: str
    """Why it was taken out, or started again last; empty if it never was."""
    address: str | None = None
    """``http://host:port`` of a vLLM that is ready. None: another back-end."""


class _Slot:
    """The place of one replica: whatever runs there now."""

    served: _Served

    def __init__(self, devices: tuple[str, ...], need: Need) -> None:
        self.devices = devices
        self.need = need
        self.replica: Replica | None = None
        """None: not ready."""
        self.asleep = False
        """Whether it has given the memory of its weights back."""
        self.out = False
        """Whether it was given up."""
        self.error: Exception | None = None
        self.load = 0
        self.scored = 0
        self.restarts: deque[float] = deque()
        self.restarted = 0
        self.spare: Replica | None = None
        """One that runs, whose model left, and which takes up this model's weights when it is launched."""
        self.suspect = asyncio.Event()
        """Set by whoever has a reason to doubt it."""
        self.keeping: asyncio.Task[None] | None = None


class _Served:
    """A model that is served, or is about to leave."""

    def __init__(self, model: ServedModel, slots: list[_Slot], queue: int) -> None:
        self.model = model
        self.slots = slots
        for slot in slots:
            slot.served = self
        self.room = asyncio.Semaphore(queue * len(slots))
        self.leases = 0
        self.asking = 0
        """Calls that are past the wait for `Pool.wake`."""
        self.leaving = False
        self.hands_over = False
        """Whether its replicas are left running when it is stopped, as `_Slot.spare`."""
        self.stopping = False
        self.retiring: asyncio.Task[None] | None = None
        self.changed = asyncio.Event()
        """Set, and replaced, when a replica becomes ready or is given up, or a lease is given back."""

    def stir(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class Pool:
    """See the module and `RewardModelPool`.

    Args:
        config: Back-end, memory, limits.
    """

    def __init__(self, config: ServingConfig) -> None:
        self._config = config
        self._served: dict[str, _Served] = {}
        self._starting: list[_Served] = []
        self._golden: dict[tuple[str, How], tuple[Golden, ...]] = {}
        """What the first replica of a model answered, by `ServedModel.key` and how it was asked; kept for good."""
        self._changing = asyncio.Lock()
        self._turning = asyncio.Lock()
        """Held while models go to sleep or wake up, which must not wait for one that is just being started."""
        self._profiling = asyncio.Lock()
        """Held while a vLLM starts: it looks how much memory is free, so two must not start on one GPU at a time."""
        self._awake = asyncio.Event()
        self._awake.set()
        if config.backend == "vllm" and config.gpus:
            self._devices = {str(gpu): int(config.gpu_memory_gb * config.gpu_share * GIB) for gpu in config.gpus}
        else:
            memory = machine_memory() / 2 if config.memory_gb is None else config.memory_gb * GIB
            self._devices = {CPU: int(memory)}

    async def __aenter__(self) -> Pool:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends every server."""
        served, self._served = [*self._served.values(), *self._starting], {}
        await asyncio.gather(*(self._stop(one) for one in served), return_exceptions=True)

    def replicas(self) -> tuple[ReplicaState, ...]:
        """All replicas, in the order of their models."""
        return tuple(
            ReplicaState(
                model=served.model.name,
                pid=slot.replica.pid if slot.replica else None,
                ready=slot.replica is not None,
                load=slot.load,
                scored=slot.scored,
                restarts=slot.restarted,
                error=str(slot.error or ""),
                address=slot.replica.address if isinstance(slot.replica, (AddressReplica, VllmReplica)) else None,
            )
            for served in self._served.values()
            for slot in served.slots
        )

    # --- which models -------------------------------------------------------------------------------------------------

    def serves(self, model: ServedModel) -> bool:
        """Whether a model is among those that are served, be it that all its servers were given up."""
        served = self._served.get(model.key)
        return served is not None and not served.leaving

    async def ready(self, model: ServedModel, seconds: float) -> None:
        """Returns when a model can be asked.

        Raises:
            ToolTimeout: Not in time.
            ToolUnavailable: It is not served, or its servers were given up.
        """
        served = self._served.get(model.key)
        if served is None:
            raise ToolUnavailable(f"{model.name} is not served")
        await self._least_loaded(served, time.monotonic() + seconds)

    async def ensure(self, models: Sequence[ServedModel]) -> None:
        wanted = {model.key: model for model in models}
        async with self._changing:
            place([need for model in wanted.values() for need in self._needs(model)], self._devices)
            # from here on there is room for what is wanted, if need be after what left has made it
            leaving = [served for key, served in self._served.items() if key not in wanted]
            for served in self._served.values():
                served.leaving = served.leaving and served.model.key not in wanted
            new = await self._new(wanted.values())
            heirs: dict[str, _Served] = {}
            try:
                if self._place_beside(new) is None:
                    heirs = self._heirs(new, leaving)
                    for served in leaving:
                        self._retire(served, hands_over=served in heirs.values())
                    await self._retired()
                    if self._place_beside(new, heirs) is None:  # elsewhere than where these lie there may be
                        await _stop_spares(heirs.values())
                        heirs = {}
                await self._start_all(new, heirs)
            finally:
                await _stop_spares(heirs.values())
            for served in leaving:
                self._retire(served)

    async def prefetch(self, models: Sequence[ServedModel]) -> bool:
        async with self._changing:
            new = await self._new({model.key: model for model in models}.values())
            if self._place_beside(new) is None:
                return False
            await self._start_all(new)
            return True

    @asynccontextmanager
    async def lease(self, model: ServedModel) -> AsyncIterator[None]:
        served = self._served.get(model.key)
        if served is None or served.leaving:
            known = ", ".join(one.model.name for one in self._served.values() if not one.leaving)
            raise ToolUnavailable(f"{model.name} is not served; served are: {known or 'none'}")
        async with self._hold(served):
            yield

    async def score(
        self, model: ServedModel, conversations: Sequence[Conversation], deadline: float
    ) -> tuple[Scored, ...]:
        end = time.monotonic() + deadline
        served = self._served.get(model.key)
        if served is None or (served.leaving and not served.leases):
            raise ToolUnavailable(f"{model.name} is not served")
        async with self._hold(served):
            clipped = [model.how.clipped(conversation) for conversation in conversations]
            parts = [clipped[start : start + CHUNK] for start in range(0, len(clipped), CHUNK)]
            scored = await _all(self._ask(served, model, part, end) for part in parts)
        return tuple(one for part in scored for one in part)

    # --- colocated placement ------------------------------------------------------------------------------------------

    async def sleep(self) -> None:
        """Gives the memory of all weights back, when what is being scored is finished. Calls then wait for `wake`.

        Raises:
            ToolTimeout: Somebody goes on scoring.
        """
        async with self._turning:
            self._awake.clear()
            try:
                end = time.monotonic() + self._config.drain_timeout_s
                for served in [*self._served.values(), *self._starting]:  # they may change while it waits
                    while served.asking:
                        await _until(served.changed.wait(), end, f"{served.model.name} goes on being asked: no sleep")
            except BaseException:
                self._awake.set()
                raise
            for slot, replica in self._running():
                slot.asleep = True
                try:
                    await replica.sleep(self._config.drain_timeout_s)
                except (ToolError, ConnectionError) as error:
                    self._doubt(slot, error)  # its successor goes to sleep as soon as it is there

    async def wake(self) -> None:
        """Takes all weights up again and checks them; a server whose golden scores are wrong now is replaced."""
        async with self._turning:
            while asleep := [(slot, replica) for slot, replica in self._running() if slot.asleep]:
                await asyncio.gather(*(self._wake(slot, replica) for slot, replica in asleep))
            self._awake.set()

    async def _wake(self, slot: _Slot, replica: Replica) -> None:
        slot.asleep = False
        try:
            await replica.wake(self._config.start_timeout_s)
            await self._check_golden(slot.served, replica)
        except (ToolError, ConnectionError) as error:
            self._doubt(slot, error)

    # --- starting and stopping ----------------------------------------------------------------------------------------

    def _needs(self, model: ServedModel) -> list[Need]:
        if model.address is not None:
            return []
        kind = VllmReplica if self._config.backend == "vllm" else TransformersReplica
        return kind.needs(model, self._config)

    async def _new(self, models: Iterable[ServedModel]) -> list[ServedModel]:
        """Those that are not served, or whose servers were all given up, after what is just being stopped is gone."""
        new = []
        for model in models:
            served = self._served.get(model.key)
            if served is not None and served.retiring is not None and not served.leaving:
                served.stir()  # it stays: its retirement ends without an effect
                await asyncio.wait([served.retiring])
                served.retiring = None
            if served is not None and all(slot.out for slot in served.slots):
                await self._stop(served)
                self._served.pop(model.key, None)
            if model.key not in self._served:
                new.append(model)
        return new

    def _heirs(self, models: Sequence[ServedModel], leaving: Sequence[_Served]) -> dict[str, _Served]:
        """For each model, by key, one of those that leave whose servers can take up its weights: it has the same shape,
        and there are golden scores that would give a failure away."""
        if (self._config.backend == "vllm" and not self._config.reload) or not self._awake.is_set():
            return {}
        found: dict[str, _Served] = {}
        free: dict[tuple[str, str], _Served] = {}
        for served in leaving:
            if served.model.path is not None and all(slot.replica is not None for slot in served.slots):
                with suppress(ToolUnavailable):  # its folder may be gone
                    free[shape(served.model.path), served.model.family] = served
        for model in models:
            if model.path is None or not (model.golden or (model.key, model.how) in self._golden):
                continue
            kind = shape(model.path), model.family
            if kind in free and model.how.max_length <= free[kind].model.how.max_length:
                found[model.key] = free.pop(kind)
        return found

    def _place_beside(
        self, models: Sequence[ServedModel], heirs: Mapping[str, _Served] | None = None
    ) -> list[list[tuple[str, ...]]] | None:
        """Devices for these beside all that runs; heirs lie where what they inherit lies. None if there is no room."""
        heirs = heirs or {}
        needs = [[] if model.key in heirs else self._needs(model) for model in models]
        running = {*self._served.values(), *heirs.values()}
        taken = [(slot.need, slot.devices) for served in running for slot in served.slots if slot.devices]
        try:
            found = place([need for part in needs for need in part], self._devices, taken)
        except ToolUnavailable:
            return None
        numbers = iter(range(len(found)))
        return [
            [slot.devices for slot in heirs[model.key].slots]
            if model.key in heirs
            else [found[next(numbers)] for _ in part]
            for model, part in zip(models, needs, strict=True)
        ]

    async def _start_all(self, models: Sequence[ServedModel], heirs: Mapping[str, _Served] | None = None) -> None:
        """Starts models, all of them or none; heirs in the servers that were left running for them."""
        heirs = heirs or {}
        places = self._place_beside(models, heirs)
        if places is None:
            raise ToolUnavailable(
                f"there is no room for {', '.join(model.name for model in models)} beside what stays where it lies, or "
                f"what left is not gone after rlar.serving.drain_timeout_s={self._config.drain_timeout_s:g} s"
            )
        started = []
        for model, devices in zip(models, places, strict=True):
            needs = self._needs(model) or [Need(name=model.name, key=model.key, devices=0, bytes_each=0)]
            slots = [_Slot(on, need) for on, need in zip(devices or [()], needs, strict=True)]
            if model.key in heirs:
                for slot, old in zip(slots, heirs[model.key].slots, strict=True):
                    slot.spare, old.spare = old.spare, None
            started.append(_Served(model, slots, self._config.queue))
        self._starting = started
        try:
            await _all(self._start(served) for served in started)
            self._served |= {served.model.key: served for served in started}
        except BaseException:
            await asyncio.gather(*(self._stop(served) for served in started), return_exceptions=True)
            raise
        finally:
            self._starting = []

    async def _start(self, served: _Served) -> None:
        """Starts a model's replicas; the first one alone, as the others are measured by its golden scores."""
        for slots in (served.slots[:1], served.slots[1:]):
            tasks = [asyncio.ensure_future(self._keep(served, slot)) for slot in slots]
            for slot, task in zip(slots, tasks, strict=True):
                slot.keeping = task
            while any(slot.replica is None and not slot.out for slot in slots):
                await served.changed.wait()
        if all(slot.out for slot in served.slots):
            error = served.slots[0].error
            raise ToolUnavailable(f"{served.model.name} cannot be served: {error}") from error

    def _retire(self, served: _Served, hands_over: bool = False) -> None:
        """Stops a model when nobody uses it any more, unless it is wanted again by then."""
        served.leaving, served.hands_over = True, hands_over
        if served.retiring is None or served.retiring.done():
            served.retiring = asyncio.ensure_future(self._drain(served))

    async def _drain(self, served: _Served) -> None:
        end = time.monotonic() + self._config.drain_timeout_s
        while served.leaving and served.leases and (left := end - time.monotonic()) > 0:
            await asyncio.wait([changed := asyncio.ensure_future(served.changed.wait())], timeout=left)
            changed.cancel()
        if not served.leaving:
            return
        if served.leases:
            served.hands_over = False  # never is a model exchanged under somebody who scores by it
            logger.warning("%s left, and is stopped while %d still use it", served.model.name, served.leases)
        await self._stop(served)
        if self._served.get(served.model.key) is served:
            del self._served[served.model.key]

    async def _retired(self) -> None:
        """Returns when what is being retired is gone."""
        retiring = [served.retiring for served in self._served.values() if served.leaving and served.retiring]
        if retiring:
            await asyncio.wait(retiring)

    async def _stop(self, served: _Served) -> None:
        tasks = [slot.keeping for slot in served.slots if slot.keeping is not None]
        if served.retiring is not None and served.retiring is not asyncio.current_task():
            tasks.append(served.retiring)
        if not served.stopping:
            for task in tasks:
                task.cancel()
        served.stopping = True
        if tasks:
            await asyncio.wait(tasks)
        if not served.hands_over:
            await _stop_spares([served])
        for slot in served.slots:
            slot.out = True
            slot.error = slot.error or ToolUnavailable(f"{served.model.name} was stopped")
        served.stir()

    # --- one replica --------------------------------------------------------------------------------------------------

    async def _keep(self, served: _Served, slot: _Slot) -> None:
        """Has a replica run in a slot, until it is cancelled or there is no hope."""
        config, wrong = self._config, 0
        while True:
            replica: Replica | None = None
            try:
                replica = await self._launch(served, slot)
                await self._check_golden(served, replica)
                asleep = False
                while asleep == self._awake.is_set():  # `sleep` and `wake`, which turn all, do not see this one yet
                    if asleep:
                        await replica.wake(config.start_timeout_s)
                        await self._check_golden(served, replica)
                    else:
                        await replica.sleep(config.start_timeout_s)
                    asleep = not asleep
                slot.asleep = asleep
                wrong = 0
                slot.suspect.clear()
                slot.replica = replica
                served.stir()
                await self._watch(served, slot, replica)
            except Exception as error:  # the boundary to the back-ends: whatever it is, the replica is none
                slot.error = error
                wrong += isinstance(error, WrongGolden)
            finally:
                ready, slot.replica = slot.replica is replica, None
                if replica is not None and ready and served.stopping and served.hands_over:
                    slot.spare = replica
                elif replica is not None:
                    await replica.stop()
            now = time.monotonic()
            while slot.restarts and slot.restarts[0] < now - RESTART_WINDOW_S:
                slot.restarts.popleft()
            hopeless = isinstance(slot.error, ToolUnavailable) or wrong > 1 or len(slot.restarts) >= config.restarts
            logger.warning("%s: a replica is %s: %s", served.model.name, "out" if hopeless else "replaced", slot.error)
            if hopeless:
                slot.out = True
                served.stir()
                return
            if slot.restarts:
                await asyncio.sleep(min(BACKOFF_S * 2 ** len(slot.restarts), MOST_BACKOFF_S))
            slot.restarts.append(now)
            slot.restarted += 1

    async def _launch(self, served: _Served, slot: _Slot) -> Replica:
        model = served.model
        if slot.spare is not None:
            replica, slot.spare = slot.spare, None
            try:
                await replica.reload(model, self._config.start_timeout_s)
                return replica
            except BaseException as error:
                await replica.stop()
                if not isinstance(error, (ToolError, ConnectionError)):
                    raise
                logger.warning("%s: a server could not take up its weights, and is replaced: %s", model.name, error)
        if model.address is not None:
            return await AddressReplica.start(model, self._config)
        if self._config.backend == "vllm":
            async with self._profiling:
                return await VllmReplica.start(model, self._config, slot.devices, slot.need.bytes_each)
        return await TransformersReplica.start(model, self._config, slot.devices)

    async def _check_golden(self, served: _Served, replica: Replica, seconds: float | None = None) -> None:
        """Asks for what is known; this is the warm-up, too.

        Args:
            served: The model.
            replica: Its server.
            seconds: How long it may take; None: as long as a start.

        Raises:
            WrongGolden: It does not know it.
        """
        model, config = served.model, self._config
        known = model.golden or self._golden.get((model.key, model.how), ())
        asked = [golden.conversation for golden in known] or GOLDEN_CONVERSATIONS
        found = await _outputs(replica, model.name, model.how, asked, seconds or config.start_timeout_s)
        if not known:
            pairs = zip(asked, found, strict=True)
            learned = tuple(Golden(conversation=one, value=scored.value) for one, scored in pairs)
            self._golden[model.key, model.how] = learned
            return
        for number, (golden, scored) in enumerate(zip(known, found, strict=True)):
            if abs(golden.value - scored.value) > config.golden_tolerance * max(1.0, abs(golden.value)):
                raise WrongGolden(
                    f"{model.name}: its server scores known conversation {number} {scored.value:.5g} instead of "
                    f"{golden.value:.5g}: other weights, another template or another precision than when that was "
                    "measured"
                )

    async def _watch(self, served: _Served, slot: _Slot, replica: Replica) -> None:
        """Raises when a replica must be replaced."""
        config = self._config
        gone = asyncio.ensure_future(replica.gone())
        suspect = asyncio.ensure_future(slot.suspect.wait())
        checked, missed = time.monotonic(), 0
        try:
            while True:
                await asyncio.wait([gone, suspect], timeout=config.health_s, return_when=asyncio.FIRST_COMPLETED)
                if suspect.done() and isinstance(slot.error, WrongGolden):
                    raise slot.error
                if gone.done():
                    raise ConnectionError(f"{served.model.name}: its server died")
                if suspect.done():
                    raise ConnectionError(f"{served.model.name}: {slot.error}")
                try:
                    await replica.check(config.health_s)
                    missed = 0
                except ToolTimeout:
                    missed += 1
                    if missed > 1:
                        raise
                if self._awake.is_set() and time.monotonic() - checked > config.golden_s:
                    seconds = config.start_timeout_s
                    if config.placement == "colocated":  # a server that hangs is found before `sleep` gives up
                        seconds = min(seconds, config.drain_timeout_s / 2)
                    served.asking += 1  # `sleep` waits for it
                    try:
                        await self._check_golden(served, replica, seconds)
                    finally:
                        served.asking -= 1
                        served.stir()
                    checked = time.monotonic()
        finally:
            gone.cancel()
            suspect.cancel()

    def _doubt(self, slot: _Slot, error: Exception) -> None:
        """Has a replica replaced, and nobody use it any more."""
        slot.error = error
        slot.replica = None
        slot.suspect.set()

    def _running(self) -> list[tuple[_Slot, Replica]]:
        models = (*self._served.values(), *self._starting)
        return [(slot, slot.replica) for served in models for slot in served.slots if slot.replica is not None]

    # --- one call -----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _hold(self, served: _Served) -> AsyncIterator[None]:
        served.leases += 1
        try:
            yield
        finally:
            served.leases -= 1
            served.stir()

    async def _ask(
        self, served: _Served, model: ServedModel, conversations: Sequence[Conversation], end: float
    ) -> list[Scored]:
        late = f"{model.name}: not scored in time"
        while not self._awake.is_set():
            await _until(self._awake.wait(), end, f"{late}: the models sleep")
        served.asking += 1
        try:
            await _until(served.room.acquire(), end, f"{late}: rlar.serving.queue={self._config.queue} calls wait")
            try:
                return await self._ask_least_loaded(served, model, conversations, end)
            finally:
                served.room.release()
        finally:
            served.asking -= 1
            served.stir()

    async def _ask_least_loaded(
        self, served: _Served, model: ServedModel, conversations: Sequence[Conversation], end: float
    ) -> list[Scored]:
        slot, replica = await self._least_loaded(served, end)
        slot.load += len(conversations)
        try:
            return await _outputs(replica, model.name, model.how, conversations, end - time.monotonic())
        except ConnectionError as error:
            if slot.replica is replica:
                self._doubt(slot, error)
            raise
        finally:
            slot.load -= len(conversations)
            slot.scored += len(conversations)

    async def _least_loaded(self, served: _Served, end: float) -> tuple[_Slot, Replica]:
        while True:
            ready = [slot for slot in served.slots if slot.replica is not None]
            if ready:
                slot = min(ready, key=lambda slot: slot.load)
                assert slot.replica is not None
                return slot, slot.replica
            if all(slot.out for slot in served.slots):
                error = served.slots[0].error
                raise ToolUnavailable(f"{served.model.name}: all its servers are out: {error}")
            await _until(served.changed.wait(), end, f"{served.model.name}: no server was ready in time")


async def _outputs(
    replica: Replica, name: str, how: How, conversations: Sequence[Conversation], seconds: float
) -> list[Scored]:
    """Scores by a replica. Raises what `Replica.ask` raises."""
    answers = await replica.ask(how, conversations, seconds)
    if len(answers) != len(conversations):
        raise ToolError(f"{name}: {len(answers)} answers to {len(conversations)} conversations")
    scored = []
    for answer in answers:
        if answer.error:
            raise ToolError(f"{name}: {answer.error}")
        try:
            value = how.value(answer.rows)
        except ToolError as error:
            raise ToolError(f"{name}: {error}") from None
        scored.append(
            Scored(
                value=value,
                rows=answer.rows,
                tokens=answer.tokens,
                truncated=answer.truncated,
                words=answer.words,
            )
        )
    return scored


async def _stop_spares(those: Iterable[_Served]) -> None:
    """Ends the servers that were left running, and that nobody took."""
    for slot in [slot for served in those for slot in served.slots]:
        if slot.spare is not None:
            replica, slot.spare = slot.spare, None
            await replica.stop()


async def _until(waiting: Awaitable[object], end: float, late: str) -> None:
    """Waits until a point in time.

    Raises:
        ToolTimeout: In vain, with this message.
    """
    try:
        await asyncio.wait_for(waiting, max(end - time.monotonic(), 0.001))
    except (TimeoutError, asyncio.TimeoutError):
        raise ToolTimeout(late) from None


async def _all(work: Iterable[Awaitable[Result]]) -> list[Result]:
    """The results of all; the first error ends the others."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
