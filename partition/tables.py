"""Tables as text, for people."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence


def table(title: str, header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table as text: the first column left, the others right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rows = [list(line) for line in lines]
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(header):
        words = name in ("what", "what it does", "meshes")
        wide = None if words else max(len(cell) for cell in (name, *(row[i] for row in rows)))
        made.add_column(name, justify="left" if i == 0 or words else "right", no_wrap=not words, min_width=wide)
    for row in rows:
        made.add_row(*row)
    out = Console(file=io.StringIO(), width=1000, color_system=None, force_jupyter=False)
    out.width = max(140, out.measure(made).minimum)  # what does not wrap is never cut
    out.print(made)
    return "\n".join(line.rstrip() for line in out.file.getvalue().splitlines() if line.strip())  # type: ignore[attr-defined]
