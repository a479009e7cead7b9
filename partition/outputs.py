"""Files that are written whole or not at all, and pictures."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from partition.errors import OutputError


def write(folder: str | Path, files: Mapping[str, str | bytes]) -> Path:
    """Write files into a folder, all of them or none. Raises OutputError where that cannot be."""
    folder, temporary = Path(folder), dict[str, str]()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            handle, temporary[name] = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
            with os.fdopen(handle, "wb") as file:
                file.write(content if isinstance(content, bytes) else content.encode())
            os.chmod(temporary[name], 0o644)
            if (folder / name).is_dir():
                raise IsADirectoryError(0, f"{name} is a folder there")
        for name, path in temporary.items():
            os.replace(path, folder / name)
    except OSError as error:
        why = "it is a file, not a folder" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        named = ", ".join(name for name in files if not name.startswith("."))
        raise OutputError(f"cannot write {named or 'there'}: {why}", where=str(folder), mend="name a folder that you may write to") from None
    finally:
        for path in temporary.values():
            Path(path).unlink(missing_ok=True)
    return folder


def writable(*folders: str | Path | None) -> None:
    """Find out, before any work is done, whether files can be written there. Raises OutputError."""
    for folder in folders:
        if folder is not None:
            missing = [p for p in (Path(folder), *Path(folder).parents) if not p.exists()]
            write(folder, {".partition": ""})
            (Path(folder) / ".partition").unlink()
            for made in missing:  # what the work does not come to fill is not left behind
                made.rmdir()


def drawn(figure: Any, path: str | Path) -> Path:
    """Save a figure of matplotlib's and close it. Raises OutputError."""
    import matplotlib.pyplot as plt

    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot draw: {error}", where=str(path), mend="name a .png, .svg or .pdf that you may write") from None
    finally:
        plt.close(figure)
    return Path(path)
