"""The user's cache folder: models that are made once, when they are first needed."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache() -> Path:
    """The folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tba"


def cached(name: str, make: Callable[[Path], None]) -> str:
    """The folder of that name in the cache; where it is not there, `make` fills it, and it appears when it is whole."""
    folder = cache() / name
    if folder.is_dir():
        return str(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent)
    try:
        make(Path(unfinished))
        os.rename(unfinished, folder)
    except OSError:  # another process was first
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return str(folder)
