"""Many random programs, cut anywhere, checked: `make fuzz` runs ten thousand. Says which primitives, loop forms and cuts they covered.

    python tests/fuzz.py --cases 10000 --from 0 --jobs 2

Each case is one seed; a failure prints it. Cases run in processes of fifty, so that nothing that JAX keeps grows without end.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
BLOCK = 50
WHOLE = 5_000
"""Cases from which on every primitive is expected; a run that lacks one fails."""
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
"""Compiled quickly: what is checked is the cut, not the compiler's last passes."""


def block(first: int, count: int) -> tuple[collections.Counter[str], list[str]]:
    """(what some cases covered, what failed)."""
    done = subprocess.run([sys.executable, __file__, "--block", str(first), str(count)], capture_output=True, text=True,
                          env=os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {QUICK}", "PYTHONPATH": f"{HERE.parent}:{HERE}", "PARTITION_CACHE": "off"})  # fmt: skip
    covered, failed = collections.Counter[str](), []
    for line in done.stdout.splitlines():
        said = json.loads(line)
        if "failed" in said:
            failed.append(f"seed {said['seed']}: {said['failed']}")
        covered.update(said.get("covered", ()))
    if done.returncode:
        failed.append(f"seeds {first} to {first + count - 1}: the process ended with {done.returncode}: {done.stderr[-400:]}")
    return covered, failed


def run_block(first: int, count: int) -> None:
    """Run some cases here, a line of JSON each."""
    import conftest  # noqa: F401  (host devices)
    from test_random import hold

    for seed in range(first, first + count):
        covered: set[str] = set()
        try:
            hold(seed, covered)
            print(json.dumps({"seed": seed, "covered": sorted(covered)}), flush=True)
        except Exception as error:
            print(json.dumps({"seed": seed, "failed": f"{type(error).__name__}: {str(error)[:300]}", "covered": sorted(covered)}), flush=True)


def report(covered: collections.Counter[str]) -> str:
    """What was covered how often, and which primitives that a work rule knows were not."""
    from random_programs import ELSEWHERE

    lines = []
    for kind in ("loop", "cut", "form"):
        lines.append(f"{kind}s: " + ", ".join(f"{name.split(' ', 1)[1]} {n:,}" for name, n in sorted(covered.items()) if name.startswith(f"{kind} ")))
    seen = primitives(covered)
    lines.append(f"primitives ({len(seen)}): {', '.join(sorted(seen))}")
    missing = uncovered(seen)
    lines.append(f"primitives with a work rule that were not covered: {', '.join(sorted(missing)) or 'none'}")
    reasons = collections.defaultdict(list)
    for name in sorted(set(ELSEWHERE) - seen):
        reasons[ELSEWHERE[name]].append(name)
    lines += [f"not drawn, {why}: {', '.join(names)}" for why, names in reasons.items()]
    return "\n".join(lines)


def primitives(covered: collections.Counter[str]) -> set[str]:
    return {name.split(" ", 1)[1] for name in covered if name.startswith("primitive ")}


def uncovered(seen: set[str]) -> set[str]:
    """Primitives that a work rule knows, that one host can run as a user writes them, and that no case had."""
    from random_programs import ELSEWHERE

    import partition.rules  # noqa: F401
    from partition.work import RULES

    return set(RULES) - seen - set(ELSEWHERE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--from", type=int, default=0, dest="first")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--block", type=int, nargs=2)
    told = parser.parse_args()
    if told.block:
        run_block(*told.block)
        return 0
    starts = range(told.first, told.first + told.cases, BLOCK)
    covered, failed, start = collections.Counter[str](), list[str](), time.time()
    with ThreadPoolExecutor(told.jobs) as pool:
        for n, (more, wrong) in enumerate(pool.map(lambda s: block(s, min(BLOCK, told.first + told.cases - s)), starts)):
            covered.update(more)
            failed += wrong
            print(f"{min((n + 1) * BLOCK, told.cases):,} of {told.cases:,} cases, {len(failed)} failed, {time.time() - start:,.0f} s", file=sys.stderr, flush=True)
            for line in wrong:
                print(line, flush=True)
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    print(report(covered))
    print(f"{told.cases:,} cases, {len(failed)} failed")
    return 1 if failed or (told.cases >= WHOLE and uncovered(primitives(covered))) else 0


if __name__ == "__main__":
    sys.exit(main())
