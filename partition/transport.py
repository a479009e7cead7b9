"""Arrays between operating-system processes, over ZeroMQ on loopback: in pieces, each with a checksum, in bounded time.

A `Wire` is one process's end: a socket that receives from everybody, and one that sends to each peer. Whoever has nothing to say sends a sign of life, so
that a peer which has died, or hangs, is known after `patience` seconds on both sides, whatever they wait for.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from partition.errors import ExecutionError, PartitionError

PIECE = 1 << 22
"""Bytes that are sent, checked and counted as a sign of life at once."""


class TransportError(ExecutionError):
    """A peer died, hangs, or sent what is not what it said. The request can be made again."""


def zmq() -> Any:
    """The transport. Raises ExecutionError where it is not installed."""
    try:
        import zmq as library
    except ImportError:
        raise ExecutionError("separate processes need pyzmq, which is not installed", where="run --processes", mend="pip install 'partition-planner[processes]'") from None
    return library


def _slept(seconds: float) -> bool:
    time.sleep(seconds)
    return False


class Wire:
    """One process's end of all its connections. Peers go by number (`names`: what to call them); names say what a message is, and each is used once.

    token: a word that all processes of a run share; others are not listened to. throttle: bytes/s that go out at most, None for as fast as they can.
    """

    def __init__(self, me: int, token: str, names: Mapping[int, str], *, patience: float, throttle: float | None = None):
        library = zmq()
        self.names = names
        self.me, self.token, self.patience, self.throttle = me, token, patience, throttle
        self.context = library.Context()
        self.inbox = self.context.socket(library.PULL)
        self.address = f"tcp://127.0.0.1:{self.inbox.bind_to_random_port('tcp://127.0.0.1')}"
        self.peers: dict[int, Any] = {}
        self.addresses: dict[int, str] = {}
        self.outbox: queue.Queue[tuple[int, str, Any]] = queue.Queue()
        self.arrived: dict[tuple[int, str], tuple[Any, float]] = {}  # (peer, name) -> (array or words, when)
        self.beat, self.epoch = min(0.25, patience / 8), 0  # s between signs of life; counts forgotten attempts
        self.building: dict[int, np.ndarray] = {}
        self.seen: dict[int, float] = {}
        self.fault: TransportError | None = None
        self.changed = threading.Condition()
        self.open = True
        self.threads = [threading.Thread(target=self._guarded, args=(work,), daemon=True) for work in (self._receive, self._send)]
        for thread in self.threads:
            thread.start()

    def connect(self, peer: int, address: str) -> None:
        """Send to a peer at an address from now on (again, where it was started anew). What was still to be sent to it before is dropped."""
        self.outbox.put((peer, "connect", address))
        with self.changed:
            self.seen[peer] = time.monotonic()

    def send(self, peer: int, name: str, value: Any) -> None:
        """Send a NumPy array or words (anything that JSON can say); does not wait."""
        self.outbox.put((peer, name, value))

    def expect(self, peer: int, seconds: float) -> None:
        """Give a peer that is being started so long until its first sign of life."""
        with self.changed:
            self.seen[peer] = time.monotonic() + seconds - self.patience

    def receive(self, peer: int, name: str, *, unless: Callable[[], PartitionError | None] = lambda: None) -> tuple[Any, float]:
        """What a peer sent under a name, and when it was there; waits. Raises TransportError where the peer is silent for too long, or `unless` gives one."""
        with self.changed:
            while (peer, name) not in self.arrived:
                self.hold(unless)
                if time.monotonic() - self.seen.get(peer, 0.0) > self.patience:
                    raise TransportError(f"{self.names[peer]} has given no sign of life for {self.patience:g} s", where=f"{self.names[self.me]}, waiting for {name!r}", mend="run the request again")
                self.changed.wait(0.1)
            return self.arrived.pop((peer, name))

    def hold(self, unless: Callable[[], PartitionError | None] = lambda: None) -> None:
        """Raise what has gone wrong."""
        if (error := self.fault or unless()) is not None:
            raise error

    def clear(self) -> None:
        """Forget an attempt: what arrived and was not read, what is still to be sent, what went wrong. Connections stay."""
        with self.changed:
            self.epoch += 1
            left = []
            while not self.outbox.empty():
                left.append(self.outbox.get_nowait())
                self.outbox.task_done()
            for order in left:
                if order[1] == "connect":
                    self.outbox.put(order)
            self.arrived, self.fault = {}, None

    def flush(self, unless: Callable[[], PartitionError | None] = lambda: None) -> None:
        """Wait until all is gone. Raises TransportError where it cannot go, or `unless` gives one."""
        while self.outbox.unfinished_tasks:
            self.hold(unless)
            time.sleep(0.002)
        self.hold(unless)

    def close(self) -> None:
        """End all connections."""
        self.open = False
        for thread in self.threads:
            thread.join(timeout=2)
        self.context.destroy(linger=0)

    def _guarded(self, work: Callable[[], None]) -> None:
        while self.open:
            try:
                work()
            except Exception as error:
                if not self.open:
                    return
                with self.changed:
                    self.fault = error if isinstance(error, TransportError) else TransportError(f"the transport failed: {type(error).__name__}: {error}", where=self.names[self.me], mend="run the request again")
                    self.changed.notify_all()

    def _send(self) -> None:
        """One turn of the sending thread: an order, or a sign of life."""
        try:
            peer, name, value = self.outbox.get(timeout=self.beat)
        except queue.Empty:
            self._alive()
            return
        try:
            if name == "connect":
                self._connect(peer, value)
            elif isinstance(value, np.ndarray):
                self._array(peer, name, value)
            else:
                self._put(peer, {"kind": "words", "name": name, "words": value}, b"")
        finally:
            self.outbox.task_done()

    def _connect(self, peer: int, address: str) -> None:
        if self.addresses.get(peer) == address:
            return
        if peer in self.peers:
            self.peers.pop(peer).close(linger=0)
        self.peers[peer], self.addresses[peer] = self.context.socket(zmq().PUSH), address
        self.peers[peer].setsockopt(zmq().SNDHWM, 8)
        self.peers[peer].connect(address)
        self._put(peer, {"kind": "alive"}, b"")

    def _alive(self) -> None:
        """A sign of life to all who can take one now."""
        for socket in self.peers.values():
            with contextlib.suppress(zmq().Again):
                socket.send_multipart([self._header({"kind": "alive"}), b""], flags=zmq().NOBLOCK)

    def _pause(self, ready: Callable[[float], bool], seconds: float) -> bool:
        """Wait so long for `ready` (given how long it may wait), giving signs of life; False where it never was, or the attempt is forgotten."""
        epoch, until = self.epoch, time.monotonic() + seconds
        while self.open and epoch == self.epoch and (left := until - time.monotonic()) > 0:
            if ready(min(left, self.beat)):
                return True
            self._alive()
        return False

    def _header(self, words: Mapping[str, Any]) -> bytes:
        return json.dumps({"token": self.token, "from": self.me, **words}).encode()

    def _put(self, peer: int, words: Mapping[str, Any], piece: Any) -> None:
        socket, epoch = self.peers[peer], self.epoch
        if self._pause(lambda s: bool(socket.poll(int(1000 * s), zmq().POLLOUT)), self.patience):
            socket.send_multipart([self._header(words), piece], copy=False)
        elif epoch == self.epoch:
            raise TransportError(f"{self.names[peer]} takes nothing for {self.patience:g} s", where=self.names[self.me], mend="run the request again")

    def _array(self, peer: int, name: str, array: np.ndarray) -> None:
        flat, epoch = np.ascontiguousarray(array).reshape(-1).view(np.uint8), self.epoch
        for start in range(0, max(flat.size, 1), PIECE):
            began, piece = time.monotonic(), flat[start : start + PIECE]
            self._put(peer, {"kind": "array", "name": name, "shape": array.shape, "dtype": array.dtype.name, "start": start, "crc": zlib.crc32(piece.data)}, piece)
            if self.throttle is not None:
                self._pause(_slept, piece.size / self.throttle - (time.monotonic() - began))
            if epoch != self.epoch:
                return

    def _receive(self) -> None:
        """One turn of the receiving thread: a message, if there is one."""
        if not self.inbox.poll(100):
            return
        raw, piece = self.inbox.recv_multipart(copy=False)
        header = json.loads(raw.bytes)
        if header.get("token") != self.token:
            return
        peer = header["from"]
        with self.changed:
            self.seen[peer] = time.monotonic()
        if header["kind"] == "words":
            self._arrive(peer, header["name"], header["words"])
        elif header["kind"] == "array":
            self._piece(peer, header, np.frombuffer(piece.buffer, np.uint8))

    def _piece(self, peer: int, header: Mapping[str, Any], piece: np.ndarray) -> None:
        name = header["name"]
        if zlib.crc32(piece.data) != header["crc"]:
            raise TransportError(f"{name!r} arrived damaged: the checksum of the piece at byte {header['start']} differs", where=f"{self.names[self.me]}, from {self.names[peer]}", mend="run the request again")
        if header["start"] == 0:
            self.building[peer] = np.empty(header["shape"], np.dtype(header["dtype"]))
        flat = self.building[peer].reshape(-1).view(np.uint8)
        flat[header["start"] : header["start"] + piece.size] = piece
        if header["start"] + piece.size >= flat.size:
            self._arrive(peer, name, self.building.pop(peer))

    def _arrive(self, peer: int, name: str, value: Any) -> None:
        with self.changed:
            self.arrived[peer, name] = (value, time.monotonic())
            self.changed.notify_all()
