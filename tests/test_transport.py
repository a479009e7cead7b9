"""What goes over the wire arrives as it was, or an error says why, in bounded time."""

from __future__ import annotations

import itertools
import time
import zlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("zmq", reason="pyzmq is an extra")

import zmq

from partition.transport import PIECE, TransportError, Wire

NAMES = {0: "the first", 1: "the second"}


@pytest.fixture
def pair() -> Iterator[tuple[Wire, Wire]]:
    wires = [Wire(n, "word", NAMES, patience=1.0) for n in (0, 1)]
    wires[0].connect(1, wires[1].address)
    wires[1].connect(0, wires[0].address)
    yield wires[0], wires[1]
    for wire in wires:
        wire.close()


ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3), np.array(True), np.zeros((0, 4), np.int8), np.arange(5).astype(ml_dtypes.bfloat16), np.arange(3).astype(ml_dtypes.float8_e4m3fn),
    np.arange(PIECE, dtype=np.int32)[::2].reshape(2, -1), np.random.default_rng(0).random(3 * PIECE // 8 + 7),
]  # fmt: skip


def test_arrays_and_words_arrive_as_they_were(pair: tuple[Wire, Wire]) -> None:
    for n, array in enumerate(ARRAYS):
        pair[0].send(1, f"a{n}", array)
    pair[0].send(1, "words", {"a": [1, None]})
    assert pair[1].receive(0, "words")[0] == {"a": [1, None]}  # in any order
    for n, array in enumerate(ARRAYS):
        got, _ = pair[1].receive(0, f"a{n}")
        assert got.dtype == array.dtype and got.shape == array.shape and got.tobytes() == np.ascontiguousarray(array).tobytes()


def test_signs_of_life_keep_a_slow_peer_and_silence_ends_a_wait(pair: tuple[Wire, Wire]) -> None:
    time.sleep(1.5)
    pair[0].send(1, "late", 1)
    assert pair[1].receive(0, "late")[0] == 1
    pair[0].close()
    start = time.monotonic()
    with pytest.raises(TransportError, match="the first has given no sign of life for 1 s"):
        pair[1].receive(0, "never")
    pair[1].send(0, "to nobody", np.zeros(4 * PIECE))
    with pytest.raises(TransportError, match="the first takes nothing"):
        for _ in range(3):
            pair[1].send(0, "to nobody", np.zeros(16 * PIECE, np.uint8))
            pair[1].flush()
    assert time.monotonic() - start < 5
    pair[1].clear()
    pair[1].hold()  # a new attempt starts clean


def test_a_damaged_piece_is_refused(pair: tuple[Wire, Wire], monkeypatch: pytest.MonkeyPatch) -> None:
    sums = itertools.count()
    monkeypatch.setattr(zlib, "crc32", lambda data: next(sums))
    pair[0].send(1, "x", np.zeros(3))
    with pytest.raises(TransportError, match=r"'x' arrived damaged: the checksum of the piece at byte 0"):
        pair[1].receive(0, "x")


def test_a_stranger_is_not_listened_to(pair: tuple[Wire, Wire]) -> None:
    stranger = Wire(0, "another word", NAMES, patience=1.0)
    stranger.connect(1, pair[1].address)
    stranger.send(1, "x", "false")
    stranger.flush()
    pair[0].send(1, "x", "true")
    assert pair[1].receive(0, "x")[0] == "true"
    stranger.close()


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'{"token": "word"}', b'{"token": "word", "from": 0, "kind": "array", "name": "x"}'], ids=repr)
def test_what_is_no_message_is_an_error_or_passed_over(pair: tuple[Wire, Wire], raw: bytes) -> None:
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.connect(pair[1].address)
        socket.send_multipart([raw, b"12"])
        pair[0].send(1, "y", 2)
        try:
            assert pair[1].receive(0, "y")[0] == 2
        except TransportError as error:
            assert "the transport failed" in str(error)


def test_a_throttled_wire_takes_its_time(pair: tuple[Wire, Wire]) -> None:
    slow: Any = Wire(0, "word", NAMES, patience=1.0, throttle=2e6)
    slow.connect(1, pair[1].address)
    start = time.monotonic()
    slow.send(1, "x", np.zeros(2 * PIECE, np.uint8))
    pair[1].receive(0, "x")
    assert 0.4 < time.monotonic() - start < 5
    slow.close()
