"""What carries a KV cache between two processes on loopback: our ZeroMQ wire (pieces with checksums) beside `jax.experimental.transfer`.

Sixty arrays of 408 KiB, the hand-off of SmolLM2-135M at 512 + 32 tokens layer by layer, and one of 64 MiB. And what a receiver sees when the sender is killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

from benchmarks import ROOT, Bar

SIZES = {"60 arrays of 408 KiB": (60, 417_792), "one of 64 MiB": (1, 1 << 26)}
LIMIT = 30.0
"""Seconds to wait for a dead sender."""


def bars(rounds: int = 5) -> list[Bar]:
    """Bytes/s of both, in turn, and seconds until a dead sender is an error."""
    rows = []
    for what, (count, nbytes) in SIZES.items():
        got: dict[str, list[float]] = {"zmq": [], "jax": []}
        for _ in range(rounds):
            for way, found in got.items():
                found.append(count * nbytes / pair(way, count, nbytes)["seconds"])
        note = "ZeroMQ with checksums; jax.experimental.transfer has none"
        rows.append(Bar.of(f"{what}: bytes/s, ZeroMQ / jax", [a / b for a, b in zip(got["zmq"], got["jax"], strict=True)], ">=", 1.0, note))
        rows += [Bar.of(f"{what}: bytes/s, {way}", found, None) for way, found in got.items()]
    for way in ("zmq", "jax"):
        seconds = pair(way, 1, 1 << 20, dead=True)
        rows.append(Bar.of(f"a killed sender is an error after [s], {way}", [seconds["seconds"]], "<=" if way == "zmq" else None, 4.0, seconds["said"]))
    return rows


def pair(way: str, count: int, nbytes: int, *, dead: bool = False) -> dict[str, Any]:
    """Start a sender and a receiver; gives what the receiver says. dead: the sender is killed before anything is asked of it."""
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    words = [sys.executable, "-m", "benchmarks.transport", way, str(count), str(nbytes)]
    one = subprocess.Popen([*words, "receive"], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    other = subprocess.Popen([*words, "send"], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert one.stdin and one.stdout and other.stdin and other.stdout
    try:
        ours, theirs = one.stdout.readline(), other.stdout.readline()
        other.stdin.write(ours)
        other.stdin.flush()
        other.stdout.readline()  # it is ready
        if dead:
            other.kill()
            other.wait()
        one.stdin.write(theirs)
        one.stdin.flush()
        start = time.monotonic()
        try:
            said = one.communicate(timeout=LIMIT)[0].strip()
        except subprocess.TimeoutExpired:
            return {"seconds": LIMIT, "said": f"nothing: still waiting after {LIMIT:g} s"}
        if not said:
            return {"seconds": time.monotonic() - start, "said": f"the receiver ended with {one.returncode}"}
        found: dict[str, Any] = json.loads(said.splitlines()[-1])
        return found
    finally:
        for process in (one, other):
            process.kill()
            process.wait()


def _zmq(count: int, nbytes: int, role: str) -> None:
    import numpy as np

    from partition.transport import TransportError, Wire

    me = int(role == "send")
    wire = Wire(me, "bench", {0: "the receiver", 1: "the sender"}, patience=2.0)
    print(json.dumps(wire.address), flush=True)
    wire.connect(1 - me, json.loads(sys.stdin.readline()) if me else wire.address)
    if me:
        arrays = [np.random.default_rng(i).integers(0, 255, nbytes, np.uint8) for i in range(count)]
        print("ready", flush=True)
        time.sleep(0.5)
        wire.send(0, "start", time.monotonic())
        for i, array in enumerate(arrays):
            wire.send(0, str(i), array)
        wire.flush()
        time.sleep(LIMIT)
        return
    wire.connect(1, json.loads(sys.stdin.readline()))
    begun = time.monotonic()
    try:
        start = wire.receive(1, "start")[0]
        last = max(wire.receive(1, str(i))[1] for i in range(count))
        print(json.dumps({"seconds": last - start, "said": ""}), flush=True)
    except TransportError as error:
        print(json.dumps({"seconds": time.monotonic() - begun, "said": error.what}), flush=True)
    os._exit(0)


def _jax(count: int, nbytes: int, role: str) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import transfer

    device = jax.devices("cpu")[0]
    server = transfer.start_transfer_server(device.client, "127.0.0.1:0", ["127.0.0.1:0", "127.0.0.1:0"])
    print(json.dumps(server.address()), flush=True)
    address = json.loads(sys.stdin.readline())
    if role == "send":
        arrays = [jax.device_put(np.random.default_rng(i).integers(0, 255, nbytes, np.uint8), device) for i in range(count)]
        for i, array in enumerate(arrays):
            server.await_pull(i, [jax.block_until_ready(array)])
        print("ready", flush=True)
        time.sleep(LIMIT)
        return
    spec = jax.ShapeDtypeStruct((nbytes,), jnp.uint8, sharding=jax.sharding.SingleDeviceSharding(device))
    start = time.monotonic()
    try:
        connection = server.connect(address)
        jax.block_until_ready([connection.pull(i, [spec]) for i in range(count)])
        said = ""
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    print(json.dumps({"seconds": time.monotonic() - start, "said": said}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    _way, _count, _nbytes, _role = sys.argv[1:]
    (_zmq if _way == "zmq" else _jax)(int(_count), int(_nbytes), _role)
