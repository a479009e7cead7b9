"""Programs, problems and runs that many tests share."""

import atexit
import functools
import itertools
import os
import shutil
import tempfile
from typing import Any

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_parallel_codegen_split_count=1".strip()  # many small programs: one piece of code each compiles a sixth faster

import numpy as np

from models import llama
from partition import pipeline, profiles
from partition.errors import InfeasibleError
from partition.evaluation import evaluate, verify
from partition.phases import Phases, tag
from partition.problem import Problem, pose
from partition.program import compile_cache, host_devices, trace

host_devices(32)
if os.environ.get("PARTITION_CACHE") != "off":  # what one test compiled, the next need not: a folder for each process, and for those that it starts
    os.environ["PARTITION_CACHE"] = tempfile.mkdtemp(prefix="partition-compiled-")
    atexit.register(shutil.rmtree, os.environ["PARTITION_CACHE"], ignore_errors=True)
compile_cache()


@functools.cache
def tagged(name: str = "tiny", **options: Any) -> tuple[Phases, tuple[Any, ...]]:
    """A traced and tagged Llama request and its arguments."""
    options = {"prompt": 12, "new_tokens": 6, "seed": 0} | options
    fn, args = llama.generation(name, **options)
    return tag(trace(fn, *args)), args


def posed(cluster: str = "trn2_efa_cs3", objective: str = "e2e", level: Any = "block", **options: Any) -> tuple[Problem, tuple[Any, ...]]:
    """The problem of a small request on a cluster, split along its weights as no search would split a model so small."""
    phases, args = tagged(**options)
    return pose(phases, profiles.cluster(cluster), objective=objective, level=level, sharding="tensor"), args


def shortest_load(problem: Problem) -> float:
    """The shortest longest load of all placements that `verify` lets through: an oracle for small problems."""
    best = np.inf
    for mesh in itertools.product(range(len(problem.meshes)), repeat=len(problem)):
        placement = problem.placement(mesh)
        try:
            verify(problem, placement)
        except InfeasibleError:
            continue
        best = min(best, max(evaluate(problem, placement).occupied))
    return best


def alternating(problem: Problem) -> Any:
    """The absurd policy: every node on another mesh than the one before."""
    return problem.placement([n % len(problem.meshes) for n in range(len(problem))])


POLICIES = {**{n: pipeline.policy(n) for n in ("single", "phase_split", "heft", "random")}, "alternating": alternating}
