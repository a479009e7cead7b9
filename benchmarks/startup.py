"""What does not need JAX does not wait for it: `partition devices` against `python -c 'import jax'`, whole processes, in turn."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import ROOT, Bar, child


def command() -> list[str]:
    """The installed script beside this interpreter, else the module."""
    script = Path(sys.executable).with_name("partition")
    return [str(script), "devices"] if script.exists() else [sys.executable, "-m", "partition", "devices"]


def wall(command: list[str]) -> float:
    """Seconds of one process, start to end."""
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    return time.perf_counter() - start


def bars(rounds: int = 11) -> list[Bar]:
    """The ratio, pair by pair, after one pair that warms the disk; and how many modules of JAX the command imported."""
    ours, theirs = command(), [sys.executable, "-c", "import jax"]
    pairs = [(wall(ours), wall(theirs)) for _ in range(rounds + 1)][1:]
    loaded = child("startup")
    name = Path(ours[0]).name if len(ours) == 2 else "python -m partition"
    return [
        Bar.of("start-up: partition devices / import jax", [a / b for a, b in pairs], "<=", 0.5, f"{name} devices"),
        Bar.of("start-up: partition devices [s]", [a for a, _ in pairs], None),
        Bar.of("start-up: import jax [s]", [b for _, b in pairs], None),
        Bar.of("start-up: jax modules loaded by it", [len(loaded)], "==", 0, ", ".join(loaded[:3])),
    ]


def _main() -> None:
    """Run the command in this process and print which modules of JAX it left in sys.modules."""
    from partition.cli import main

    sys.argv = ["partition", "devices"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end
    print("\n" + json.dumps([m for m in sys.modules if m.split(".")[0] in ("jax", "jaxlib")]))


if __name__ == "__main__":
    _main()
