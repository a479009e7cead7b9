"""A policy that is stopped after some time: what counts then is the best feasible placement that it has evaluated."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from partition.errors import PartitionError, PlacementError
from partition.evaluation import WATCH, Estimate, scored, verify
from partition.problem import Placement, Problem

_LONGEST = 1e8
"""Seconds that a timer may be set to."""


class _Stopped(BaseException):
    """Raised inside a policy whose time is over; no `except Exception` of its own holds it."""


def within(seconds: float, policy: Callable[..., Placement], problem: Problem, **options: Any) -> Placement:
    """Run a policy for some seconds at most. Raises PlacementError where it had evaluated nothing feasible by then, and away from the main thread.

    The operating system's timer interrupts Python between two of its steps, so a call into a library ends first.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise PlacementError(f"a policy cannot run for {seconds:g} s", where="seconds=...", mend="give it some time")
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        raise PlacementError("a time limit needs the main thread of a Unix system", where="seconds=...", mend="leave the limit out")
    best: list[tuple[float, Placement]] = []
    free = dataclasses.replace(problem, limits={})  # the score has the limits in it; to verify them would be to evaluate again

    def seen(of: Problem, placement: Placement, estimate: Estimate) -> None:
        if of is not problem:
            return
        score = scored(problem, estimate)
        if not best or score < best[0][0]:
            try:
                best[:] = [(score, dataclasses.replace(verify(free, placement), problem=problem))]
            except PartitionError:
                return

    def stop(_: int, __: FrameType | None) -> None:
        raise _Stopped

    before, token = signal.signal(signal.SIGALRM, stop), WATCH.set(seen)
    try:
        signal.setitimer(signal.ITIMER_REAL, min(seconds, _LONGEST))
        return policy(problem, **options)
    except _Stopped:
        if not best:
            raise PlacementError(f"the policy took longer than {seconds:g} s and had evaluated nothing that fits", where=getattr(policy, "__name__", "policy"),
                                 mend="give it more time") from None  # fmt: skip
        return best[0][1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        WATCH.reset(token)
