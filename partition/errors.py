"""Every error that a user can meet. Each says what is wrong, where, and the mend, in three lines.

`ExitCode` is what the command line ends with; an error class carries its own.
"""

from __future__ import annotations

import contextlib
import difflib
import enum
import functools
import importlib
import os
import sys
import traceback
from collections.abc import Iterable
from typing import Any


class ExitCode(enum.IntEnum):
    """What the command line ends with."""

    OK = 0
    MISMATCH = 1
    USAGE = 2
    INFEASIBLE = 3
    CRASH = 4


def told(error: BaseException) -> str:
    """An exception in one line: its type, and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def user_line(error: BaseException, *libraries: str) -> str:
    """Where a user's code raised: the last line of the traceback outside of this package and of the folders named; else the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    foreign = (os.path.dirname(__file__), importlib.__path__[0], "<frozen importlib", *libraries)
    last = ([f for f in frames if not f.filename.startswith(foreign)] or frames)[-1]
    return f"{last.filename}:{last.lineno} ({last.name}): {last.line}"


def written_at(error: BaseException) -> str:
    """Where a user's code raised under JAX or Flax: its last line that is none of theirs."""
    return user_line(error, *libraries(), contextlib.__file__)


def libraries() -> tuple[str, ...]:
    """The folders of JAX, of Flax and of what else models are written with, of those that are loaded."""
    loaded = (sys.modules.get(name) for name in ("jax", "flax", "optax", "haiku", "equinox"))
    return tuple(os.path.dirname(m.__file__) for m in loaded if m is not None and m.__file__)


class PartitionError(Exception):
    """Root of the tree. `what` is one sentence, `where` a file, field, op or argument, `mend` what to do about it."""

    exit_code = ExitCode.USAGE

    def __init__(self, what: str, *, where: str, mend: str):
        super().__init__(f"{what}\n  where: {where}\n  mend:  {mend}")
        self.what, self.where, self.mend = what, where, mend

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors come back from other processes as they are."""
        return functools.partial(type(self), where=self.where, mend=self.mend), (self.what,), {k: v for k, v in self.__dict__.items() if k not in ("what", "where", "mend")}


class ArgumentError(PartitionError, TypeError):
    """A verb was given a value of another type than it takes."""


class ProfileError(PartitionError):
    """A device, link or cluster profile is malformed, or a number in it has no unit, kind or source."""


class NameUnknownError(PartitionError):
    """A model, policy, device, cluster or objective that nobody registered."""

    @classmethod
    def among(cls, kind: str, name: str, known: Iterable[str], *, where: str = "", mend: str = "") -> NameUnknownError:
        """Build the error with the nearest known names."""
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
        return cls(f"there is no {kind} called {name!r}", where=where or f"{kind} {name!r}", mend=f"{hint}{mend and '; '}{mend}")


class TraceError(PartitionError):
    """The function cannot be traced, or does what no stage can carry."""


class GraphError(PartitionError):
    """A graph breaks its own grammar: a tensor used before it is made, made twice, or made by nobody."""


class PhaseError(PartitionError):
    """The phases cannot be told from the structure."""


class WorkError(PartitionError):
    """An op has no work rule, or a loop no known number of trips."""


class PlacementError(PartitionError):
    """A placement does not cover the problem, or a policy failed or returned something else."""


class InfeasibleError(PartitionError):
    """The problem has no placement within its capacities: an expected answer, not a crash."""

    exit_code = ExitCode.INFEASIBLE


class ExecutionError(PartitionError):
    """The stages cannot run on this host: too few devices, arguments that do not match the trace."""


class EquivalenceError(PartitionError):
    """Cut and uncut program differ by more than the stated bound. `verdict` holds the whole comparison."""

    exit_code = ExitCode.MISMATCH
    verdict: object = None


class InstanceError(PartitionError):
    """A file that holds no problem."""


class OutputError(PartitionError):
    """A file cannot be read or written."""
