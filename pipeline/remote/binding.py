"""Which remote store a local folder is the cache of: a small file in it, so that two stores are never mixed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from pipeline.remote.store import Upstream
from pipeline.store.drafts import draft_folder
from pipeline.store.files import StoreError

__all__ = ["BINDING", "Binding", "bind", "bound_to"]

BINDING: Final = "upstream.json"


class Binding(NamedTuple):
    """What the file says."""

    id: str
    """The remote store's own name, which it keeps wherever it is moved."""
    url: str


def bound_to(root: Path) -> Binding | None:
    """The remote store that a folder is the cache of; None: of none.

    Raises:
        StoreError: the note was altered.
    """
    try:
        note = json.loads((root / BINDING).read_text(encoding="utf-8"))
        return Binding(str(note["id"]), str(note["url"]))
    except (FileNotFoundError, NotADirectoryError):  # the first write says what stands in the way of a store
        return None
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{root / BINDING} is damaged; remove it, and what lies here is uploaded again") from None


def bind(root: Path, upstream: Upstream, adopt: Callable[[], None]) -> None:
    """Make a folder the cache of a remote store, or see that it is.

    Args:
        adopt: called before a folder becomes a cache, for what it holds.

    Raises:
        StoreError: it is the cache of another; names both and says what to do.
    """
    note = bound_to(root)
    found = upstream.identity(create=note is None)
    if found is None or (note is not None and note.id != found):
        assert note is not None
        what = f"store {found[:12]}" if found else "no store yet"
        raise StoreError(
            f"{root} is the cache of the store {note.id[:12]} at {note.url}; at {upstream.url} there is {what}. Two stores are "
            f"not mixed: mend COHORT_STORE, choose another --root, or remove {root / BINDING} to upload what lies here "
            f"to {upstream.url}"
        )
    if note is None:
        adopt()
    if note != (found, upstream.url):
        with draft_folder(root) as draft:
            (draft / BINDING).write_text(json.dumps({"id": found, "url": upstream.url}), encoding="utf-8")
            os.replace(draft / BINDING, root / BINDING)
