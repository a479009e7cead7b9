"""`python -m benchmarks [names] [--json FILE]`: measure all bars or the named ones, print them as a Markdown table."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import traceback
from pathlib import Path

from benchmarks import NAMES, Bar
from partition.origin import versions


def main() -> int:
    """Exit code 0 where every bar is met, 1 where one is not or could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NAMES)}; all if none is given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    options = parser.parse_args()
    if wrong := set(options.names) - set(NAMES):
        parser.error(f"no benchmark is called {sorted(wrong)[0]!r}; there are {', '.join(NAMES)}")
    rows: list[Bar] = []
    failed: list[str] = []
    for name in options.names or NAMES:
        print(f"... {name}", file=sys.stderr, flush=True)
        try:
            rows += importlib.import_module(f"benchmarks.{name}").bars()
        except Exception:
            traceback.print_exc()
            failed.append(name)
    print(", ".join(f"{k} {v}" for k, v in versions().items()), end="\n\n")
    print("| bar | target | median | least .. most (samples) | met | how |\n|---|---|---|---|---|---|")
    for row in rows:
        print(row)
    for name in failed:
        print(f"| {name} | | | | **could not be measured** | see stderr |")
    if options.json:
        options.json.write_text(json.dumps({"versions": dict(versions()), "bars": [dataclasses.asdict(r) for r in rows], "failed": failed}, indent=1))
    return 1 if failed or any(r.met is False for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
