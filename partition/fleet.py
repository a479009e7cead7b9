"""fleet(): how many machines of each kind a placement takes under a load, how busy they are, how long requests queue, and what a token then costs.

Each mesh of a placement is copied until none of its copies is busier than asked (rate matching), so prefill and decode machines stand in the ratio that
the load needs. Requests arrive at random and are alike; a serving simulation, with mixed lengths and batches that grow and shrink, is not here.
"""

from __future__ import annotations

import dataclasses
import math

from partition.errors import PlacementError
from partition.evaluation import Estimate, crossings, evaluate
from partition.phases import Phase
from partition.problem import Placement, Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fleet:
    """A placement under a load.

    rate [requests/s]: of whole batches. copies [m], busy [m] (share of the time): of each mesh, 0 where it has no part. waited [m] s: mean queueing.
    ttft [s]: of a request, queueing included. usd_per_second: all machines, and the bytes that are paid for; usd_per_mtok: of that for each million
    tokens written. estimate: of one request alone.
    """

    problem: Problem = dataclasses.field(repr=False)
    estimate: Estimate
    rate: float
    copies: tuple[int, ...]
    busy: tuple[float, ...]
    waited: tuple[float, ...]
    ttft: float
    usd_per_second: float
    usd_per_mtok: float
    ratio: tuple[int, int]

    @property
    def machines(self) -> str:
        """How many meshes of each device, as "3 trn2 + 1 cs3"."""
        kinds = dict.fromkeys(self.problem.kinds)
        counts = {kind: sum(c for c, k in zip(self.copies, self.problem.kinds, strict=True) if k == kind) for kind in kinds}
        return " + ".join(f"{n} {kind}" for kind, n in counts.items() if n)

    def line(self, kind: str) -> tuple[float, float]:
        """($/s of all that is not of a kind, devices of the kind): what the fleet costs as a line in the price of one such device."""
        p, own = self.problem, [m for m, k in enumerate(self.problem.kinds) if k == kind]
        devices = sum(self.copies[m] * devices_of(p, m) for m in own)
        return self.usd_per_second - sum(self.copies[m] * float(p.price[m]) for m in own), float(devices)


def devices_of(problem: Problem, mesh: int) -> int:
    """Devices of a mesh; 1 where the problem was made without a cluster."""
    return 1 if problem.cluster is None else problem.cluster.meshes[mesh].count


def fleet(problem: Problem, placement: Placement, rate: float, *, busiest: float = 0.8) -> Fleet:
    """What a placement takes at `rate` requests/s (of the problem's batch each), no machine busier than `busiest` of the time (four fifths unless told: assumed).

    A copy of a mesh serves one request for as long as it is occupied with it, or its links are, whichever is longer. Waits are those of M/D/k queues: half of what
    Erlang's C gives. Source: Erlang (1917); Allen-Cunneen approximation for k servers (Allen, 1990). Raises PlacementError for a rate or a share that is none.
    """
    if not (math.isfinite(rate) and rate > 0 and 0 < busiest < 1):
        raise PlacementError(f"{rate:g} requests/s on machines busy {busiest:g} of the time is no load", where="fleet", mend="give a rate above 0, and a share between 0 and 1")
    e = evaluate(problem, placement)
    if not all(math.isfinite(x) for x in (e.ttft, *e.occupied)):
        raise PlacementError("the placement never ends, so no number of machines serves it", where="fleet", mend="place it where all links are")
    service = _service(problem, placement, e)
    copies = [max(1, math.ceil(rate * s / busiest * (1 - 1e-12))) if s > 0 else 0 for s in service]
    waited = [wait(rate, s, k) if k else 0.0 for s, k in zip(service, copies, strict=True)]
    pools = [{int(m) for n in problem.nodes(phase) for m in placement.of(n)} for phase in (Phase.PREFILL, Phase.DECODE)]
    first, second = (sorted(pools[0]) or sorted({int(m) for m in placement.mesh})), sorted(pools[1] - pools[0])
    queued = max((waited[m] for m in first), default=0.0) + max((waited[m] for m in second), default=0.0)
    bytes_usd = sum(nbytes * float(problem.link_price[pair]) for pair, nbytes in e.link_bytes.items())
    paid = sum(k * float(problem.price[m]) for m, k in enumerate(copies)) + rate * bytes_usd
    return Fleet(
        problem=problem, estimate=e, rate=rate, copies=tuple(copies), busy=tuple(rate * s / k if k else 0.0 for s, k in zip(service, copies, strict=True)), waited=tuple(waited),
        ttft=e.ttft + queued, usd_per_second=paid, usd_per_mtok=paid / (rate * problem.workload.tokens) * 1e6, ratio=(sum(copies[m] for m in pools[0]), sum(copies[m] for m in pools[1])),
    )  # fmt: skip


def _service(problem: Problem, placement: Placement, e: Estimate) -> list[float]:
    """Seconds for which a request keeps a copy of each mesh: its work, the busiest of the links into it, or what its ports send."""
    ports, into = [0.0] * len(problem.meshes), [0.0] * len(problem.meshes)
    for i, a, b in crossings(problem, placement):
        f = problem.flows[i]
        ports[a] += f.nbytes * f.times / float(problem.wire[a, b]) if problem.wire[a, b] > 0 else 0.0
    for (_, b), seconds in e.link_busy.items():
        into[b] = max(into[b], seconds)
    return [max(float(x), p, i) for x, p, i in zip(e.occupied, ports, into, strict=True)]


def wait(rate: float, service: float, servers: int) -> float:
    """Mean seconds in the queue of `servers` that each take exactly `service` s, for arrivals at random; inf where they are not enough."""
    load = rate * service
    if load >= servers:
        return math.inf
    if servers > 10_000:  # the limit of many servers (Halfin and Whitt, 1981)
        spare = (1 - load / servers) * math.sqrt(servers)
        phi, density = 0.5 * (1 + math.erf(spare / math.sqrt(2))), math.exp(-(spare**2) / 2) / math.sqrt(2 * math.pi)
        return 0.5 * service / (servers - load) / (1 + spare * phi / density) if density > 0 else 0.0
    blocked = 1.0  # Erlang's B, server by server
    for k in range(1, servers + 1):
        blocked = load * blocked / (k + load * blocked)
    queued = blocked / (1 - load / servers * (1 - blocked))
    return 0.5 * queued * service / (servers - load)
