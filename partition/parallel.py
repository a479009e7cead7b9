"""The same work on many tasks, in several processes: local ones, or what `joblib.parallel_config` names (Dask, Ray)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from partition.errors import PartitionError


def each(work: Callable[..., Any], tasks: Iterable[Sequence[Any]], jobs: int) -> Iterator[Any]:
    """What the work gives for the arguments of each task, in their order, as soon as it is there. jobs: processes (1: this one; -1: one a core)."""
    if jobs < -1 or jobs == 0:
        raise PartitionError(f"{jobs} processes cannot run anything", where="jobs", mend="give a number from 1, or -1 for one a core")
    if jobs == 1:
        return (work(*task) for task in tasks)
    import joblib

    try:
        run = joblib.Parallel(n_jobs=jobs, return_as="generator")
    except ValueError:  # a backend that gives results only all at once
        run = joblib.Parallel(n_jobs=jobs)
    return iter(run(joblib.delayed(work)(*task) for task in tasks))
