"""launch(): an export's meshes in operating-system processes of their own, which share nothing but a network connection on loopback.

Every process walks the same steps. It computes those of its own meshes; where a value leaves one, it is sent as soon as it is there, while the next
stage runs; where one comes in, it is waited for; of all else it only knows that it is elsewhere. So no process tells another what to do next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from partition import _jax
from partition.arguments import checked
from partition.artifacts import Exported, as_value, load
from partition.dispatch import Arrays, Machine
from partition.errors import ExecutionError, OutputError, PartitionError, told
from partition.graph import Value
from partition.stages import Stage
from partition.transport import TransportError, Wire

HOME = -1
"""The number of the process that launches the others."""
START = 60.0
"""Seconds that a process may take until its first sign of life."""
FAILURES: Mapping[str, type[PartitionError]] = {kind.__name__: kind for kind in (TransportError, OutputError, ExecutionError)}
"""What a process may say went wrong."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delivery:
    """One transfer between processes: `ready` when it was made, `arrived` when it was whole at its end, in seconds from the start of the request."""

    value: Value
    src: int
    dst: int
    trip: int
    nbytes: int
    ready: float
    arrived: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a request gave. attempts: how often it was run. planned: bytes that the plan says cross; moved: that did.

    overlap: of the bytes handed over before the token loop, the share that had arrived when the last of them was made; planned_overlap: the share that the
    stages make before their mesh's last one.
    """

    outputs: tuple[np.ndarray, ...] = dataclasses.field(repr=False)
    deliveries: tuple[Delivery, ...] = dataclasses.field(repr=False)
    seconds: float
    attempts: int
    planned: float
    planned_overlap: float

    @property
    def moved(self) -> int:
        """Bytes that crossed."""
        return sum(d.nbytes for d in self.deliveries)

    @property
    def overlap(self) -> float:
        """The share of the hand-off that ran while its makers still computed; 0 where nothing is handed over."""
        early = [d for d in self.deliveries if d.trip < 0]
        last = {m: max(d.ready for d in early if d.src == m) for m in {d.src for d in early}}
        return sum(d.nbytes for d in early if d.arrived < last[d.src]) / (sum(d.nbytes for d in early) or 1)

    def __str__(self) -> str:
        last = f"{100 * self.overlap:.0f} % of the hand-off while prefill ran (its stages allow {100 * self.planned_overlap:.0f} %)"
        return f"{len(self.deliveries)} transfers, {self.moved:,} B (planned {self.planned:,.0f} B), each checksummed; {last}; {self.seconds:.2f} s; attempts: {self.attempts}"


class _Elsewhere:
    """An array that another process holds."""


ELSEWHERE = _Elsewhere()


class _Part:
    """The machine of one process: a machine that computes, for the meshes of this process alone."""

    def __init__(self, own: Machine, meshes: Mapping[int, int], wire: Wire, attempt: int, stopped: Callable[[], TransportError | None], typed: Callable[[int, Any], Any]):
        self.own, self.of, self.wire, self.attempt, self.stopped, self.typed = own, meshes, wire, attempt, stopped, typed
        self.arrays: Arrays = self
        self.moves = self.answers = 0
        self.trip = -1
        self.deliveries: list[dict[str, Any]] = []
        self.made: queue.Queue[tuple[int, str, Any] | None] = queue.Queue()
        self.ready: dict[str, float] = {}
        self.failed: Exception | None = None
        self.watch = threading.Thread(target=self._watch, daemon=True)
        self.watch.start()

    def mine(self, mesh: int) -> bool:
        return self.of[mesh] == self.wire.me

    def given(self, value: Value, mesh: int) -> Any:
        return self.own.given(value, mesh) if self.mine(mesh) else ELSEWHERE

    def compute(self, stage: Stage, arrays: Sequence[Any], trip: int) -> Sequence[Any]:
        self.trip = trip
        return self.own.compute(stage, arrays, trip) if self.mine(stage.mesh) else [ELSEWHERE] * len(stage.outputs)

    def move(self, array: Any, value: Value, src: int, dst: int) -> Any:
        name = f"{self.attempt} move {self.moves}"
        self.moves += 1
        if self.of[src] == self.of[dst]:
            return self.own.move(array, value, src, dst) if self.mine(dst) else ELSEWHERE
        if self.mine(src):
            self.made.put((self.of[dst], name, array))
            return ELSEWHERE
        if not self.mine(dst):
            return ELSEWHERE
        found, when = self.wire.receive(self.of[src], name, unless=self.stopped)
        self.deliveries.append({"name": name, "value": value, "src": src, "dst": dst, "trip": self.trip, "nbytes": found.nbytes, "arrived": when})
        return self.typed(value[0], found)

    def truth(self, array: Any, mesh: int) -> bool:
        name = f"{self.attempt} answer {self.answers}"
        self.answers += 1
        if not isinstance(array, _Elsewhere):
            answer = bool(array)
            for peer in set(self.of.values()) - {self.wire.me}:
                self.wire.send(peer, name, answer)
            return answer
        return bool(self.wire.receive(self.of[mesh], name, unless=self.stopped)[0])

    def rows(self, array: Any, start: int, stop: int) -> Any:
        return array if isinstance(array, _Elsewhere) else self.own.arrays.rows(array, start, stop)

    def row(self, array: Any, index: int) -> Any:
        return array if isinstance(array, _Elsewhere) else self.own.arrays.row(array, index)

    def join(self, arrays: Sequence[Any]) -> Any:
        return ELSEWHERE if any(isinstance(a, _Elsewhere) for a in arrays) else self.own.arrays.join(arrays)

    def copy(self, array: Any) -> Any:
        return array if isinstance(array, _Elsewhere) else self.own.arrays.copy(array)

    def stack(self, arrays: Sequence[Any], value: Value) -> Any:
        return ELSEWHERE if any(isinstance(a, _Elsewhere) for a in arrays) else self.own.stack(arrays, value)

    def settle(self, array: Any, value: Value, mesh: int) -> Any:
        return array if isinstance(array, _Elsewhere) else self.own.settle(array, value, mesh)

    def _watch(self) -> None:
        """Hand each array on to the wire when it is there, whichever is first; the walk is far ahead by then."""
        waiting: list[tuple[int, str, Any]] = []
        more = True
        while more or waiting:
            with contextlib.suppress(queue.Empty):
                while (item := self.made.get(timeout=None if more and not waiting else 0.0005)) is not None:
                    waiting.append(item)
                more = False
            there = {name for _, name, array in waiting if not hasattr(array, "is_ready") or array.is_ready()}
            now = time.monotonic()  # of all alike: what one stage made is there at one time, though it is sent one after the other
            for peer, name, array in (item for item in waiting if item[1] in there):
                try:
                    found = _jax.to_numpy(array)
                    self.ready[name] = now
                    self.wire.send(peer, name, found)
                except Exception as error:  # said by finish(), on the thread that asked
                    self.failed = error
            waiting = [item for item in waiting if item[1] not in there]

    def finish(self) -> None:
        """Wait until all is made and gone. Raises what went wrong."""
        self.made.put(None)
        self.watch.join()
        if self.failed is not None:
            raise self.failed
        self.wire.flush(self.stopped)


def serve(folder: str, me: int, meshes: Mapping[int, int], names: Mapping[int, str], home: str, token: str, patience: float, throttle: float | None, attempt: int) -> None:
    """One process: load what its meshes need, then answer requests until told to stop, or until the launching process is gone."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    wire = Wire(me, token, names, patience=patience, throttle=throttle)
    wire.connect(HOME, home)
    wire.expect(HOME, START)
    wire.send(HOME, f"{attempt} hello", wire.address)
    placed: dict[tuple[Value, int], Any] = {}
    exported: Exported | None = None
    try:
        exported = load(folder, {m for m, p in meshes.items() if p == me})
        wire.send(HOME, f"{attempt} loaded", True)
    except Exception as error:
        _failed(wire, attempt, error, attempted=False)
    while exported is not None and (order := wire.receive(HOME, "order")[0]) is not None:
        try:
            wire.send(HOME, f"{order['attempt']} done", _answer(exported, wire, meshes, order, placed))
            wire.flush()
        except Exception as error:
            _failed(wire, order["attempt"], error)
    wire.close()


def _end_with(parent: int) -> None:
    """End this process soon after the launching one, however that ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _failed(wire: Wire, attempt: int, error: Exception, *, attempted: bool = True) -> None:
    """Say what went wrong, and forget the attempt."""
    if attempted:
        wire.clear()
    known = error if isinstance(error, PartitionError) else ExecutionError(told(error), where=wire.names[wire.me], mend="this is a fault of the planner; report it")
    wire.send(HOME, f"{attempt} failed", [type(known).__name__, known.what, known.where, known.mend])
    wire.flush()


def _answer(exported: Exported, wire: Wire, meshes: Mapping[int, int], order: Mapping[str, Any], placed: dict[tuple[Value, int], Any]) -> dict[str, Any]:
    """Run one request; sends the outputs that lie here. Gives what is told of it."""
    attempt = order["attempt"]
    for peer, address in order["peers"].items():
        if int(peer) != wire.me:
            wire.connect(int(peer), address)
    inputs = {name: wire.receive(HOME, f"{attempt} input {name}")[0] for name in order["inputs"]}

    def stopped() -> TransportError | None:
        return TransportError("the request was given up", where=wire.names[wire.me], mend="run it again") if (HOME, f"{attempt} stop") in wire.arrived else None

    own = exported.machine(inputs, placed)
    part = _Part(own, meshes, wire, attempt, stopped, exported.typed)
    results = exported.walked(part)
    for n, (array, mesh) in enumerate(results):
        if meshes[mesh] == wire.me:
            part.made.put((HOME, f"{attempt} output {n}", array))
    part.finish()
    return {"deliveries": part.deliveries, "ready": part.ready, "outputs": [n for n, (_, m) in enumerate(results) if meshes[m] == wire.me]}


class Processes:
    """Launched processes; a context manager. One for each mesh that an export uses."""

    def __init__(self, folder: Path, *, patience: float, throttle: float | None, progress: Callable[[str], None] | None):
        self.folder, self.patience, self.throttle, self.say = folder, patience, throttle, progress or (lambda _: None)
        try:
            self.manifest = json.loads((folder / "manifest.json").read_text())
            self.meshes = {m: n for n, m in enumerate(sorted({s["mesh"] for s in self.manifest["stages"]}))}
            self.names = {HOME: "the launching process"} | {n: f"the process for {self.manifest['meshes'][m]['name']}" for m, n in self.meshes.items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ExecutionError(f"the export cannot be read: {told(error)}", where=str(folder), mend="name a folder that `partition export` wrote; if it is one, export again or copy it again") from None
        self.token, self.attempt = secrets.token_hex(8), 0
        self.wire = Wire(HOME, self.token, self.names, patience=patience)
        self.lock = threading.Lock()  # one request at a time
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.addresses: dict[int, str] = {}

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop all processes."""
        for n, process in self.running.items():
            if process.poll() is None:
                self.wire.send(n, "order", None)
        for process in self.running.values():
            try:
                process.wait(timeout=3)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.running = {}
        self.wire.close()

    def run(self, inputs: Mapping[str, Any] | None = None, *, retries: int = 0) -> Answer:
        """Run a request, once more up to `retries` times where a process dies or a transfer fails; dead processes are started anew.

        inputs: arrays by name in place of the exported ones. Raises TransportError in bounded time; it may be called again, also by several threads, whose requests
        then wait for each other.
        """
        if retries < 0:
            raise ExecutionError(f"a request cannot be retried {retries} times", where="run(retries=...)", mend="give 0 or more")
        with self.lock:
            return self._tries(inputs, retries)

    def _tries(self, inputs: Mapping[str, Any] | None, retries: int) -> Answer:
        for left in reversed(range(retries + 1)):
            try:
                return self._attempt(inputs or {}, retries + 1 - left)
            except TransportError as error:
                if not left:
                    raise
                self.say(f"again, because {error.what}")
        raise AssertionError

    def _attempt(self, inputs: Mapping[str, Any], count: int) -> Answer:
        self.attempt += 1
        attempt = self.attempt
        self.wire.clear()
        self._start()
        start = time.monotonic()
        for n in self.running:
            self.wire.send(n, "order", {"attempt": attempt, "peers": self.addresses, "inputs": list(inputs)})
            for name, array in inputs.items():
                self.wire.send(n, f"{attempt} input {name}", _jax.to_numpy(array))
        said: dict[int, Any] = {}
        try:
            for n in self.running:
                said[n] = self._wait(n, f"{attempt} done")
            outputs = {i: self._wait(n, f"{attempt} output {i}") for n, words in said.items() for i in words["outputs"]}
        except PartitionError:
            self._give_up(said)
            raise
        ready = {name: when for words in said.values() for name, when in words["ready"].items()}
        deliveries = [Delivery(value=as_value(d["value"]), src=d["src"], dst=d["dst"], trip=d["trip"], nbytes=d["nbytes"], ready=ready[d["name"]] - start, arrived=d["arrived"] - start)
                      for words in said.values() for d in words["deliveries"]]  # fmt: skip
        planned = sum(c["bytes"] * c["times"] for c in self.manifest["crosses"])
        return Answer(outputs=tuple(outputs[i] for i in sorted(outputs)), deliveries=tuple(sorted(deliveries, key=lambda d: d.ready)), seconds=time.monotonic() - start, attempts=count, planned=planned,
                      planned_overlap=_overlap(self.manifest, deliveries))  # fmt: skip

    def _start(self) -> None:
        """Start what does not run, and wait until it has loaded."""
        fresh = [n for n in self.meshes.values() if n not in self.running or self.running[n].poll() is not None]
        for n in fresh:
            words = json.dumps([str(self.folder), n, list(self.meshes.items()), list(self.names.items()), self.wire.address, self.token, self.patience, self.throttle, self.attempt])
            self.running[n] = subprocess.Popen([sys.executable, "-m", "partition.processes", words], env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"}, stdout=subprocess.DEVNULL)
            self.say(f"start {self.names[n]}")
        for n in fresh:
            self.wire.expect(n, START)
            self.addresses[n] = self._wait(n, f"{self.attempt} hello")
            self.wire.connect(n, self.addresses[n])
        for n in fresh:
            self._wait(n, f"{self.attempt} loaded")

    def _wait(self, n: int, name: str) -> Any:
        """Words of a process. Raises TransportError where any process has died or failed."""

        def lost() -> PartitionError | None:
            for other, process in self.running.items():
                if (words := self.wire.arrived.get((other, f"{self.attempt} failed"))) is not None:
                    kind, what, where, mend = words[0]
                    return FAILURES.get(kind, ExecutionError)(what, where=where if where.startswith(self.names[other]) else f"{self.names[other]}: {where}", mend=mend)
                if (code := process.poll()) is not None:
                    how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
                    return TransportError(f"{self.names[other]} {how}", where=f"attempt {self.attempt}", mend="run the request again (retries=1, --retries 1): it is started anew")
            return None

        return self.wire.receive(n, name, unless=lost)[0]

    def _give_up(self, said: Mapping[int, Any]) -> None:
        """Tell all that still run to stop, and wait for their word; end those that do not give it."""
        for n, process in self.running.items():
            if process.poll() is None and n not in said:
                self.wire.send(n, f"{self.attempt} stop", True)
        until = time.monotonic() + self.patience + 1.0
        for n, process in self.running.items():
            while process.poll() is None and n not in said and not {(n, f"{self.attempt} failed"), (n, f"{self.attempt} done")} & set(self.wire.arrived):
                if time.monotonic() > until:
                    process.kill()
                    process.wait()
                time.sleep(0.01)


def _overlap(manifest: Mapping[str, Any], deliveries: Sequence[Delivery]) -> float:
    """The share of the hand-off's bytes that the stages make before the last one of their mesh that hands anything over."""
    made = {as_value(v): s["id"] for s in manifest["stages"] if s["region"] == "top" for v in s["outputs"]}
    early = [(d, max((i for v, i in made.items() if v[0] == d.value[0]), default=-1)) for d in deliveries if d.trip < 0]
    last = {m: max(i for d, i in early if d.src == m) for m in {d.src for d, _ in early}}
    return sum(d.nbytes for d, i in early if i < last[d.src]) / (sum(d.nbytes for d, _ in early) or 1)


@checked
def launch(folder: str | Path, *, patience: float = 10.0, throttle: float | None = None, progress: Callable[[str], None] | None = None) -> Processes:
    """Processes for an export (made with its arguments, or with inputs given to `run`): `with launch(folder) as processes: processes.run()`.

    patience [s]: after how long without a sign of life a peer counts as dead. throttle [B/s]: what a process sends at most.
    Raises ExecutionError where the folder holds no export or pyzmq is not installed.
    """
    for name, value in (("patience", patience), ("throttle", throttle)):
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf")):
            raise ExecutionError(f"{name} is {value!r}", where=f"launch({name}=...)", mend="give a number above 0")
    return Processes(Path(folder), patience=patience, throttle=throttle, progress=progress)


if __name__ == "__main__":
    _folder, _me, _meshes, _names, *_rest = json.loads(sys.argv[1])
    with contextlib.suppress(TransportError, KeyboardInterrupt):  # whoever launched this is gone, or has given up on it: there is nobody to tell
        serve(_folder, _me, dict(map(tuple, _meshes)), dict(map(tuple, _names)), *_rest)
