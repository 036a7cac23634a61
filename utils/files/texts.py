"""Text and JSON files read with care: no pipes, no gigabytes, and a checksum in every JSON that is written."""

from __future__ import annotations

import hashlib
import json
import stat
from collections import Counter
from pathlib import Path

LARGEST = 1 << 26  # bytes of a text that is read at once: a thousand times what any of ours has
CHECKSUM = "checksum"  # the key that write_json adds and parse_json takes away


def read_text(path: str | Path) -> str:
    """Read a text file, in UTF-8.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no file (a pipe would never end), too large for a text, or no UTF-8.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is no file: give one")
        if status.st_size > LARGEST:
            raise ValueError(f"{path} has {status.st_size:,} bytes: no text file here has more than {LARGEST:,}")
        return path.read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"no file {path}: check the path") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}): use another copy"
        ) from error


def checksum(content: dict) -> str:
    """Return the SHA-256 of what a JSON file holds."""
    return f"sha256:{hashlib.sha256(json.dumps(content).encode()).hexdigest()}"


def _object(pairs: list[tuple[str, object]]) -> dict:
    """Return an object of JSON; of two equal keys Python would drop the first.

    Raises:
        ValueError: a key stands there twice.
    """
    counts = Counter(name for name, _ in pairs)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{twice!r} stands there twice")
    return dict(pairs)


def parse_json(path: str | Path) -> dict:
    """Read a JSON file that holds an object, without its checksum, which is compared where there is one.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, was edited, or holds something else.
    """
    text = read_text(path)
    try:
        content = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, or use another copy") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no object in braces, but {type(content).__name__}: use another file")
    stated = content.pop(CHECKSUM, None)
    if stated is None and any(str(value).startswith("sha256:") for value in content.values()):
        stated = "under another name"  # the damage has hit the key
    if stated is not None and stated != checksum(content):
        raise ValueError(
            f"{path} does not have its checksum, so it was damaged or edited: use another copy, or remove "
            f"its {CHECKSUM!r} if you edited it"
        )
    return content
