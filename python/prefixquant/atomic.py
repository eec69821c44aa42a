# SPDX-License-Identifier: Apache-2.0
"""Folders and files that appear whole or not at all.

Everything is written under another name beside the destination, is flushed to the disk, and takes
its name in one rename. A writer of a folder that fails removes what it has made; one that is killed
leaves hidden folders that nothing takes for finished ones: `remove_stale_partials` removes those.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder to fill; when the block ends without an error it becomes ``path``.

    Args:
        path: the folder to make. What stands there is replaced, and comes back if that fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield partial
        partial.chmod(usual_mode(0o777))  # mkdtemp makes a private folder
        _flush_folder(partial)
        _take_name(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove_stale_partials(path: Path) -> None:
    """Removes what killed writers of this folder have left beside it."""
    made_here = re.compile(rf"\.{re.escape(path.name)}\.[^.]{{8}}\.(partial|old)")
    for entry in path.parent.iterdir():
        if made_here.fullmatch(entry.name) and entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)


def usual_mode(most: int) -> int:
    """The permissions that this process gives to what it makes: ``most`` less the umask."""
    umask = os.umask(0)  # there is no way to read it
    os.umask(umask)
    return most & ~umask


def place_file(partial: Path, path: Path) -> None:
    """Flushes a finished file to the disk and gives it its name in the same folder."""
    _flush(partial)
    os.replace(partial, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Forces a file or a folder to the disk: a rename that follows must not overtake it.

    Some network file systems cannot flush a folder; there a rename lasts as well as they see to it.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def _flush_folder(folder: Path) -> None:
    for entry in [*folder.rglob("*"), folder]:
        _flush(entry)


def _take_name(partial: Path, path: Path) -> None:
    """Gives the finished folder its name; an old folder goes only when the new one stands."""
    replaced = None
    if path.exists() and any(path.iterdir()):
        # The name is free for an instant only: folders cannot be exchanged portably.
        replaced = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
        os.rename(path, replaced)
    try:
        os.rename(partial, path)
    except BaseException:
        if replaced is not None:
            os.rename(replaced, path)
        raise
    _flush(path.parent)
    if replaced is not None:
        shutil.rmtree(replaced)
