"""Tables as text, for people."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence


def table(title: str, header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table as text: the first column left, the others right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(header):
        words = name in ("what", "what it does", "meshes")
        made.add_column(name, justify="left" if i == 0 or words else "right", no_wrap=not words)
    for line in lines:
        made.add_row(*line)
    out = Console(file=io.StringIO(), width=140, color_system=None, force_jupyter=False)
    out.print(made)
    return "\n".join(line.rstrip() for line in out.file.getvalue().splitlines() if line.strip())  # type: ignore[attr-defined]
