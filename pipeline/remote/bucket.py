"""Files under an fsspec URL (`s3://`, `gs://`, `file://`), with retries and errors that say what to do.

Dropped connections, time-outs, throttling and errors of the server are retried. Credentials, permissions, a missing bucket and
a clock that is off are not. The libraries' own retries are off, so that one place decides. No request is a HEAD, whose answers
have no body and so no reason.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from pipeline.config import ConfigError
from pipeline.progress import report
from pipeline.remote.errors import complaint, is_missing, passes
from pipeline.store.files import StoreError

PATIENCE: Final = 60.0
"""Seconds for which one request is retried. Ours: throttling and a restarted gateway pass in less."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0
_EXTRAS: Final = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
"""Scheme -> the package of its file system; fsspec itself knows the others, and says what they need."""
_OPTIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "s3fs": {"config_kwargs": {"retries": {"total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": 60}},
    "file": {"auto_mkdir": True},
}

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A file in a listing."""

    size: int
    modified: float
    """Seconds since the epoch by the server's clock."""


class Bucket:
    """The files below one URL; names are relative to it. Nothing is imported before the first request."""

    def __init__(self, url: str, *, patience: float = PATIENCE) -> None:
        """Take a URL and for how many seconds to retry a request; raise ConfigError as `checked_url` does."""
        self.url = checked_url(url)
        self.patience = patience
        self.scheme = urlsplit(self.url).scheme
        self._package = _EXTRAS.get(self.scheme, self.scheme)
        self._whole = {"max_concurrency": 1} if self._package == "s3fs" else {}  # else it asks for the size first
        self._opened: tuple[int, Any, str] | None = None

    def read(self, name: str) -> bytes:
        """Return a file's content; raise FileNotFoundError where a bucket lacks it, else StoreError, as all calls."""
        data: bytes = self._ask(lambda fs, path: fs.cat_file(path, **self._whole), name)
        return data

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        """Return the contents of many small files, requested together; missing ones are left out."""
        found: dict[str, bytes] = {}
        names = list(names)
        for start in range(0, len(names), 500):
            part = names[start : start + 500]
            found |= self._ask(functools.partial(_contents, names=part, how=self._whole), "")
        return found

    def write(self, name: str, data: bytes, *, patience: float | None = None) -> None:
        """Write or replace a small file; readers see it whole or not at all."""

        def put(fs: Any, path: str) -> None:
            if self.scheme != "file":  # one request, which counts as a whole
                fs.pipe_file(path, data)
                return
            draft = f"{path}.{uuid.uuid4().hex[:8]}.part"
            fs.pipe_file(draft, data)
            os.replace(draft, path)

        self._ask(put, name, patience)

    def upload(self, local: Path, name: str) -> None:
        """Copy a local file up; the caller checks what arrived."""
        self._ask(lambda fs, path: fs.put_file(str(local), path), name)

    def download(self, name: str, local: Path) -> None:
        """Copy a file down; the caller checks what arrived."""
        self._ask(lambda fs, path: fs.get_file(path, str(local)), name)

    def entries(self, folder: str) -> dict[str, Entry]:
        """Return the files below a folder, by their names in it; none where there is no such folder."""
        if self._package == "s3fs":  # with a prefix it does not ask for a file of the folder's name
            return self._ask(lambda fs, root: _listed(fs, root, folder, prefix=f"{folder}/"), "")
        return self._ask(lambda fs, root: _listed(fs, root, folder), "")

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, if they are there."""
        for name in names:
            try:
                self._ask(lambda fs, path: fs.rm_file(path), name)
            except FileNotFoundError:
                continue

    def _ask(self, request: Callable[[Any, str], T], name: str, patience: float | None = None) -> T:
        fs, root = self._open()  # imports take longer than a request, and are no fault of the server
        end = time.monotonic() + (self.patience if patience is None else patience)
        pause, attempts = _FIRST_PAUSE, 0
        while True:
            attempts += 1
            try:
                return request(fs, f"{root}/{name}" if name else root)
            except StoreError:
                raise
            except Exception as error:
                if is_missing(error):
                    raise FileNotFoundError(f"{self.url}/{name}") from error
                if not passes(error) or time.monotonic() + pause > end:
                    raise StoreError(complaint(error, self.url, attempts)) from error
                report("upstream", retry=attempts, reason=f"{type(error).__name__}: {str(error)[:200]}")
                time.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _open(self) -> tuple[Any, str]:
        """Return the file system and the root's path in it; a new one after a fork, which these libraries do not survive."""
        if self._opened is None or self._opened[0] != os.getpid():
            import fsspec

            options = {"use_listings_cache": False, "skip_instance_cache": True, **_OPTIONS.get(self._package, {})}
            fs, root = fsspec.core.url_to_fs(self.url, **options)
            if self._package == "s3fs":
                fs.retries = 1
            self._opened = (os.getpid(), fs, root.rstrip("/"))
        return self._opened[1], self._opened[2]


def is_url(text: str) -> bool:
    """Return whether a text is a URL, and not a local folder (`s3:/bucket` is what a path makes of a URL)."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text) is not None


def checked_url(url: str) -> str:
    """Return the URL of a store, which messages and files may contain.

    Raise ConfigError for no URL, credentials in it, an unknown scheme, or one whose package is not installed.
    """
    parts = urlsplit(url)
    if not is_url(url) or "://" not in url:
        raise ConfigError(f"expected a URL such as s3://bucket/folder, found {url.split('?')[0].split('@')[-1]!r}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            f"{parts.scheme}://{parts.netloc.split('@')[-1]}{parts.path}: a store's URL is kept in files and messages, so it "
            "may hold no user, password or query; name credentials by the environment (AWS_PROFILE, AWS_ACCESS_KEY_ID, "
            "GOOGLE_APPLICATION_CREDENTIALS), the endpoint by AWS_ENDPOINT_URL"
        )
    package = _EXTRAS.get(parts.scheme)
    if package and importlib.util.find_spec(package) is None:
        wanted = "'cohort-rl[s3]'" if package == "s3fs" else package
        raise ConfigError(
            f"{parts.scheme}:// needs the package {package}, which is not installed: pip install {wanted}"
        )
    if not package:
        from fsspec.registry import known_implementations, registry

        if parts.scheme not in known_implementations and parts.scheme not in registry:
            raise ConfigError(
                f"unknown scheme {parts.scheme}://; expected s3://, gs://, file:// or another of fsspec's"
            )
    return url.rstrip("/")


def _contents(fs: Any, root: str, names: list[str], how: Mapping[str, Any]) -> dict[str, bytes]:
    answers = fs.cat([f"{root}/{name}" for name in names], on_error="return", **how)
    found = {}
    for path, answer in answers.items():
        if isinstance(answer, bytes):
            found[path.removeprefix(f"{root}/").lstrip("/")] = answer
        elif not is_missing(answer):
            raise answer
    return found


def _listed(fs: Any, root: str, folder: str, **how: str) -> dict[str, Entry]:
    path = f"{root}/{folder}"
    try:
        found = fs.find(root if how else path, detail=True, **how)
    except FileNotFoundError as error:
        if is_missing(error):
            return {}
        raise
    place = fs._strip_protocol(path)
    return {
        name.removeprefix(f"{place}/"): Entry(int(info["size"]), _modified(info))
        for name, info in found.items()
        if info["type"] == "file" and name != place
    }


def _modified(info: Mapping[str, Any]) -> float:
    """Return when a file was written, whatever its file system calls that."""
    for name in ("LastModified", "last_modified", "mtime", "updated", "created"):
        match info.get(name):
            case datetime() as moment:
                return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
            case int() | float() as seconds:
                return float(seconds)
            case str() as text:
                return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    raise StoreError(f"the file system behind the store does not say when a file was written (it says {sorted(info)})")
