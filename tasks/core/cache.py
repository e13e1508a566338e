"""Local folders that several processes share: who uses one locks it, and only what nobody uses is removed.

The lock is the system's own (flock), so it ends with its process, however that ends. Where a disk knows no locks,
nothing is removed.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_held: dict[Path, int] = {}


def make_cache(cache: Path) -> Path:
    """Return the cache's folder, made for its user alone: it has copies of rows, answers and models. Raises OSError."""
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.mkdir(mode=0o700, exist_ok=True)
    return cache


@contextlib.contextmanager
def held_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent` that is held within, and removed afterwards. Raises OSError."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=parent))
    handle = _lock(folder, fcntl.LOCK_SH)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[bool]:
    """Make a folder if need be and yield whether this process has it to itself within: not where another holds it, or
    the disk knows no locks. It stays. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = folder.exists() and os.path.samestat(os.fstat(handle), folder.stat())  # not removed just now
    except OSError:
        mine = False
    try:
        yield mine
    finally:
        os.close(handle)


def hold(folder: Path) -> bool:
    """Hold a folder until this process ends, and note that it was used now; return False where there is none."""
    try:
        handle = _held.get(folder)
        if handle is None or not os.path.samestat(os.fstat(handle), folder.stat()):
            handle = _lock(folder, fcntl.LOCK_SH)
            if not os.path.samestat(os.fstat(handle), folder.stat()):  # removed while we waited for the lock
                os.close(handle)
                return False
            _held[folder] = handle
        with contextlib.suppress(PermissionError):  # another user's
            os.utime(folder)
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False


def remove_unheld(folder: Path) -> bool:
    """Remove a folder, or a file, unless a process holds it; return whether it was removed. Raises OSError."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or there are no locks here
        os.close(handle)
        return False
    try:
        if not folder.is_dir():
            folder.unlink()
            return True
        away = tempfile.mkdtemp(dir=folder.parent)
        folder.rename(away)  # at once: nobody finds half of it
        shutil.rmtree(away)
        return True
    finally:
        os.close(handle)


def is_held(folder: Path) -> bool:
    """Return whether a process uses a folder or a file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(handle)


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder, or of a file."""
    found = folder.stat().st_size if folder.is_file() else 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                found += os.lstat(os.path.join(place, name)).st_size
    return found


def trim_cache(cache: Path, limit_bytes: int, dry_run: bool = False) -> list[tuple[str, int]]:
    """Remove artifacts from the cache, the longest unused first, until all take at most `limit_bytes` or are in use;
    return the path and size of each that was (with `dry_run`: would be) removed."""
    found = []
    for folder in (cache / "artifacts").glob("*/*"):
        with contextlib.suppress(FileNotFoundError):
            found.append((folder.stat().st_mtime, folder, folder_bytes(folder)))
    total, removed = sum(size for _, _, size in found), []
    for _, folder, size in sorted(found):
        if total <= limit_bytes:
            break
        if not is_held(folder) if dry_run else remove_unheld(folder):
            removed.append((folder.relative_to(cache).as_posix(), size))
            total -= size
    return removed


def _lock(folder: Path, how: int) -> int:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.suppress(OSError):  # a disk without locks: there nothing is removed
        fcntl.flock(handle, how)
    return handle
