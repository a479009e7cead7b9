"""Problems that come from no program: nodes, what passes between them, and machines, with nothing of what a cluster and a request would add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from partition.flow import Flow, Resident
from partition.phases import Phase
from partition.problem import Problem, unique
from partition.workload import Workload


def plain(
    names: Sequence[str], kinds: Sequence[str], seconds: np.ndarray, passed: Sequence[tuple[int, Sequence[int], float]], size: np.ndarray, capacity: np.ndarray, **more: Any,
) -> Problem:  # fmt: skip
    """A problem of n nodes in topological order on m meshes: seconds [n, m], values (who makes it, its readers, bytes), size [n] B that lie with each
    node, capacity [m] B. Transfers, prices and power are nothing and memory holds no state, unless `more` says so, which are fields of Problem."""
    n, m = len(names), len(kinds)
    flows = [Flow(value=(i, None), src=src, dst=tuple(sorted(set(dst) - {src})), nbytes=nbytes, times=1, kind="forward") for i, (src, dst, nbytes) in enumerate(passed)]
    residents = tuple(Resident(name=names[i], kind="weights", value=(n + i, None), blocks=(i,), nbytes=float(size[i])) for i in range(n) if size[i] > 0)
    counts = {kind: iter(range(m)) for kind in kinds}
    none: dict[str, Any] = {
        "alpha": np.zeros((m, m)), "beta": np.full((m, m), np.inf), "wire": np.full((m, m), np.inf), "link_price": np.zeros((m, m)), "price": np.zeros(m), "power": np.zeros(m),
        "depth": np.ones(m), "layer": np.full(n, -1), "meshes": tuple(f"{kind}.{next(counts[kind])}" for kind in kinds),
    }  # fmt: skip
    return Problem(
        names=unique(names), phase=(Phase.NONE,) * n, region=("top",) * n, kinds=tuple(kinds), seconds=seconds, times=np.ones(n, np.int64),
        flows=tuple(sorted((f for f in flows if f.dst), key=lambda f: (f.src, f.value))), residents=residents,
        resident=np.array([[r.nbytes] * m for r in residents]).reshape(len(residents), m), activation=np.zeros((n, m)), capacity=capacity,
        workload=Workload(batch=1, trips=0), objective="throughput", **none | more,
    )  # fmt: skip
