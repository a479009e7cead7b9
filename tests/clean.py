"""A thousand checks of cuts that are right: none may raise an alarm. `make clean-checks`; on the other Python `make clean-checks PYTHON=python3.13`.

    python tests/clean.py --cases 1000

Every family of models in several forms, cut by several policies over five meshes, with weights and prompts of many seeds, on one thread and on two.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FAMILIES = ("llama", "gemma", "gpt2", "mixtral", "deepseek", "mamba", "t5")
FORMS: tuple[dict[str, Any], ...] = ({}, {"layers": "scanned"}, {"dtype": "bfloat16", "batch": 2}, {"loop": "while", "eos": 7}, {"sample": True, "logits": True})
POLICIES = ("phase_split", "random", "equal_split")


def block(index: int, seeds: int) -> tuple[int, int, list[str]]:
    """(checks, those in which roundings tip a near tie, alarms) of one family, form and number of threads, in a process of its own."""
    family, form, threads = FAMILIES[index // 2 % len(FAMILIES)], index // 2 // len(FAMILIES) % len(FORMS), 1 + index % 2
    done = subprocess.run([sys.executable, __file__, "--block", family, str(form), str(threads), str(seeds)], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": f"{HERE.parent}:{HERE}", "PARTITION_CACHE": "off"})
    said = [json.loads(line) for line in done.stdout.splitlines()]
    alarms = [f"{family} {s['options']}, {s['policy']}, seed {s['seed']}, {threads} threads: {s['alarm']}" for s in said if s["alarm"]]
    if done.returncode:
        alarms.append(f"{family} {FORMS[form]}: the process ended with {done.returncode}: {done.stderr[-400:]}")
    return len(said), sum(s["tie"] for s in said), alarms


def run_block(family: str, form: int, threads: int, seeds: int) -> None:
    """Checks here, a line of JSON each. The threads of XLA's pool are as many as the processors that the process may use when JAX starts."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    import partition as pt

    pt.host_devices(16)
    generation = importlib.import_module(f"models.{family}").generation
    options = {"batch": 1, "prompt": 10, "new_tokens": 5} | FORMS[form]
    try:
        fn, args = generation("tiny", seed=0, **options)
    except (TypeError, ValueError):  # a family that has no such form is checked in the plain one, and said to be
        options = {"batch": 1, "prompt": 10, "new_tokens": 5}
        fn, args = generation("tiny", seed=0, **options)
    program = pt.trace(fn, *args)
    problem = pt.pose(pt.tag(program), pt.cluster("trn2_efa_4cs3"), sharding="tensor")
    for policy in POLICIES:
        stages = pt.cut(program, pt.place(problem, policy))
        runner = pt.prepare(stages)
        for seed in range(seeds):
            alarm, tie = "", False
            try:
                tie = pt.check(stages, *generation("tiny", seed=seed, **options)[1], runner=runner).tie
            except Exception as error:
                alarm = f"{type(error).__name__}: {error}"
            print(json.dumps({"options": options, "policy": policy, "seed": seed, "alarm": alarm, "tie": tie}), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--block", nargs=4)
    told = parser.parse_args()
    if told.block:
        run_block(told.block[0], *map(int, told.block[1:]))
        return 0
    blocks = 2 * len(FAMILIES) * len(FORMS)
    seeds = -(-told.cases // (blocks * len(POLICIES)))
    checks, ties, alarms, start = 0, 0, list[str](), time.time()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for n, (more, tipped, wrong) in enumerate(pool.map(lambda i: block(i, seeds), range(blocks))):
            checks, ties = checks + more, ties + tipped
            alarms += wrong
            print(f"{n + 1} of {blocks} settings, {checks:,} checks, {len(alarms)} alarms, {time.time() - start:,.0f} s", file=sys.stderr, flush=True)
            print(*wrong, sep="\n", end="\n" if wrong else "", flush=True)
    print(f"{checks:,} clean checks, {len(alarms)} alarms; {ties} equal up to a choice at a near tie, which roundings tip")
    return 1 if alarms or checks < told.cases else 0


if __name__ == "__main__":
    sys.exit(main())
