"""Where a result comes from: versions, the revision of the repository that it was made in, and a hash of each profile that it rests on."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

from partition.hardware import Cluster
from partition.overrides import quantities
from partition.shipped import OURS

PACKAGES = (OURS, "jax", "jaxlib", "flax", "numpy")


@functools.cache
def versions() -> Mapping[str, str]:
    """What made a result: Python, the packages that decide it, and the git revision of the folder that it was made in ("+" where files were changed)."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"working_folder_git": revision(os.getcwd())}


@functools.cache
def revision(folder: str) -> str:
    """The git revision of a folder, "+" behind it where tracked files were changed; "none" outside of a repository."""
    try:
        said = [subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, timeout=5, check=True).stdout.strip() for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))]
    except (OSError, subprocess.SubprocessError):
        return "none"
    return said[0] + ("+" if said[1] else "")


def hashes(cluster: Cluster | None) -> dict[str, str]:
    """Device or link -> a hash of its numbers, so that two results tell whether they rest on the same."""
    numbers: dict[str, list[Any]] = {}
    for name, _, q in quantities(cluster) if cluster is not None else ():
        numbers.setdefault(name.split(".")[0], []).append((name, float(q), q.low, q.high))
    return {name: hashlib.sha256(json.dumps(held).encode()).hexdigest()[:12] for name, held in sorted(numbers.items())}


def made(cluster: Cluster | None = None, **said: Any) -> dict[str, Any]:
    """What a result carries as plain values: versions, profiles, and whatever else was said, such as seeds."""
    return {"versions": dict(versions()), "profiles": hashes(cluster)} | said
