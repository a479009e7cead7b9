"""Partition: a planner that partitions a JAX model graph across unlike accelerators, and proves the result on CPU.

`import partition as pt`; the verbs lead one value to the next: trace, tag, pose, place, cut, run, check; `plan` is the whole chain.
Names are loaded when first used, so that importing the package starts neither JAX nor NetworkX.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "Cluster": "hardware", "EquivalenceError": "errors", "Estimate": "evaluation", "ExitCode": "errors", "PartitionError": "errors", "Phase": "phases", "Placement": "problem",
    "Plan": "pipeline", "Problem": "problem", "Program": "program", "Stages": "stages", "Timeline": "timeline", "Verdict": "verdict",
    "Work": "work", "check": "equivalence", "cluster": "profiles", "compare": "bench", "curves": "scaling", "compile_cache": "program", "cut": "stages", "diff": "changes", "frame": "frames", "device": "profiles",
    "evaluate": "evaluation", "explain": "explanation", "export": "artifacts", "draw": "figures", "fit": "fidelity.fitting", "front": "fronts", "host_devices": "program", "launch": "processes", "load_export": "artifacts:load", "lower_bound": "bounds", "model": "pipeline", "operators": "fidelity.kernels", "place": "pipeline",
    "plan": "pipeline", "policy": "pipeline", "pose": "problem", "prepare": "execution", "rank": "ranks", "read_instance": "instances:read", "report": "reporting:html", "rule": "work",
    "run": "execution", "sensitivity": "swings", "schedule": "timeline", "sweep": "sweeps", "tag": "phases", "trace": "program", "transfers": "dispatch", "uncut": "execution",
    "validate": "fidelity", "verify": "evaluation", "write_problem": "records:write", "Batch": "batch", "Moves": "moves",
}  # fmt: skip

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'partition' has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    value = getattr(importlib.import_module(f"partition.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
