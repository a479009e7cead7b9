"""What a published point speaks of, ready to be priced: a transfer on a link, or a phase of a traced model on a mesh of one device.

The points are of tensor-parallel servers, so the model is split along its weights over all devices.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from partition import profiles
from partition.anatomy import Kind as Part
from partition.collectives import transfer
from partition.costs import Cost, Request, costs
from partition.errors import NameUnknownError, ProfileError
from partition.fidelity.measurements import Measurements
from partition.graph import Graph, held, itemsize
from partition.graph import weights as weights_of
from partition.hardware import Cluster, Edge, End, Mesh, Quantity
from partition.overrides import banded
from partition.phases import Phase, Phases, is_weight, tag
from partition.pricing import layouts
from partition.program import trace
from partition.work import Work, work

Seconds = Callable[[Cluster], float]


def subject(m: Measurements, given: Mapping[str, Any], path: Path) -> tuple[Cluster, Seconds]:
    """The cluster of a point, and what it predicts on that cluster or on one with other numbers. Raises ProfileError, NameUnknownError."""
    return _transfer(m, given) if m.metric == "transfer" else _phase(m, given, path)


def band(cluster: Cluster, seconds: Seconds) -> tuple[float, float]:
    """The prediction's band, from those of the cluster's numbers as if they were independent: the squares of what each does add up, in logarithms."""
    middle, squares = seconds(cluster), {True: 0.0, False: 0.0}
    for name, _, q in banded(cluster):
        for end in (End.LOW, End.HIGH):
            shift = math.log(seconds(cluster.replace({name: float(q.at(end))})) / middle)
            squares[shift > 0] += shift * shift
    return middle * math.exp(-math.sqrt(squares[False])), middle * math.exp(math.sqrt(squares[True]))


def _transfer(m: Measurements, given: Mapping[str, Any]) -> tuple[Cluster, Seconds]:
    link = profiles.link(m.subject)
    mesh = Mesh(name="a", device=profiles.device("h100"), count=1, stand_in=1)
    cluster = Cluster(name="two", title="two machines", meshes=(mesh, dataclasses.replace(mesh, name="b")), edges=(Edge(src="a", dst="b", link=link),))
    return cluster, lambda c: transfer(float(given["bytes"]), c.edges[0])


def _phase(m: Measurements, given: Mapping[str, Any], path: Path) -> tuple[Cluster, Seconds]:
    """One decode step, or prefill, on one mesh of the subject."""
    device, count = profiles.device(m.subject), int(given.get("chips", 1))
    if "side" in given:
        if device.region is None:
            raise ProfileError(f"{m.subject} has no regions, a side says nothing", where=f"{path}: columns", mend="leave the column out")
        side = Quantity(value=float(given["side"]), kind=m.kind, source=m.source)
        device = dataclasses.replace(device, region=dataclasses.replace(device.region, side=side))
    if count > 1 and m.fabric is None:  # devices, or wafers
        raise ProfileError(f"{count} devices are joined by no fabric", where=str(path), mend='name a link: fabric = "..."')
    wafers, count = (count, 1) if device.region is not None else (1, count)  # layers lie on one wafer after the other
    mesh = Mesh(name=m.subject, device=device, count=count, stand_in=1, fabric=profiles.link(m.fabric) if m.fabric else None)
    cluster = Cluster(name=m.subject, title=m.title, meshes=(mesh,), edges=())
    length, tokens = int(given.get("prompt", 0)), 2
    if m.metric == "tpot":  # many steps, so that the split is the one that serves decode
        length = int(given.get("context", length))
        tokens = max(2, length // 2)
        length -= tokens if "context" in given else 0
    phases = _tagged(m.models, str(given["model"]), length, tokens, int(given.get("batch", 1)), str(given.get("dtype", "")), str(path))
    graph, loop = phases.program.graph, phases.token_loop
    assert loop is not None and loop.loop is not None
    works = work(graph, weights=is_weight(phases.program))
    if "weights" in given:
        works = _quantised(works, graph, str(given["weights"]))
    (split,) = layouts(phases, works, cluster, tensor=True)
    level: Graph = loop.loop.body if m.metric == "tpot" else graph
    # the lengths that were published are those that were compiled: nothing is padded, and all of the cache is in use
    asked = Request(prefill={op.id for op in graph.walk() if phases.of.get(op.id) is Phase.PREFILL}, batch=int(given.get("batch", 1)))
    left_out = {Part.HEAD, Part.SAMPLING} if m.without_head else set[Part]()
    counted = [op.id for op in level.ops if op is not loop and phases.anatomy.kind[op.id] not in left_out]
    layers = float(max(phases.anatomy.layers.counts.values(), default=1)) / wafers
    passed = graph.tensors[next(i for i in level.ops if i is not loop and i.loop is not None).outputs[0]].nbytes if wafers > 1 else 0.0  # of the layers' scan

    def seconds(c: Cluster) -> float:
        (here,) = c.meshes
        table: Mapping[int, Cost] = costs(graph, works, split, here, layers=layers, request=asked)
        chip = here.device.systolic
        served = 0.0 if chip is None else float(chip.start if m.metric == "ttft" else chip.step)
        if wafers > 1 and here.fabric is not None:  # from wafer to wafer, and back with the token
            served += wafers * (float(here.fabric.alpha) + passed / float(here.fabric.beta))
        return float(sum(table[i].seconds for i in counted)) + served

    return cluster, seconds


@functools.lru_cache(maxsize=64)
def _tagged(models: str, model: str, prompt: int, tokens: int, batch: int, dtype: str, where: str) -> Phases:
    module, _, attribute = models.partition(":")
    try:
        generation = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        raise NameUnknownError(f"there is no model maker {models!r}", where=f"{where}: models", mend="write module:callable, as models.llama:generation") from None
    options: dict[str, Any] = {"dtype": dtype} if dtype else {}
    fn, args = generation(model, batch=batch, prompt=prompt, new_tokens=tokens, layers="scanned", **options)
    return tag(trace(fn, *args))


def _quantised(works: Mapping[int, Work], graph: Graph, dtype: str) -> dict[int, Work]:
    """Work of a program whose layers' weights are held in a narrower dtype than it was traced with; tables and heads stay as they are."""
    layers, tensors, found = held(graph) - weights_of(graph), graph.tensors, dict(works)
    for op in graph.walk():
        if op.primitive == "dot_general":
            inner = [tensors[t] for t in op.inputs if t in layers and len(tensors[t].shape) > 1]
            less = sum(t.nbytes * (1 - itemsize(dtype) / itemsize(t.dtype)) for t in inner)
            found[op.id] = dataclasses.replace(works[op.id], read=works[op.id].read - less)
    return found
