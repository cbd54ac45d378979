"""A hub on the loopback interface: the parts of the API that a download uses, over folders of files at named commits."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Hub:
    """What the server serves, and what it was asked."""

    commits: dict[tuple[str, str], Path] = field(default_factory=dict)
    """(repository, commit) -> folder of its files."""
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    """(repository, branch) -> commit."""
    gated: set[str] = field(default_factory=set)
    """Repositories whose files are not handed out."""
    asked: list[str] = field(default_factory=list)
    """Paths in the order of the requests."""
    url: str = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._about("/".join(parts[2:4]), parts[4:])
        return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def _about(self, repository: str, rest: list[str]) -> tuple[int, dict[str, str], bytes]:
        if repository not in {name for name, _ in self.commits}:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        revision = rest[1]
        commit = self.branches.get((repository, revision), revision)
        if (repository, commit) not in self.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if rest[0] == "revision":
            about: Any = {"id": repository, "sha": commit, "siblings": []}
            return 200, {"Content-Type": "application/json"}, json.dumps(about).encode()
        folder = self.commits[repository, commit]
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        about = [
            {
                "type": "file",
                "path": file.relative_to(folder).as_posix(),
                "size": file.stat().st_size,
                "oid": _etag(file),
            }
            for file in files
        ]
        return 200, {"Content-Type": "application/json"}, json.dumps(about).encode()

    def _file(self, repository: str, commit: str, name: str) -> tuple[int, dict[str, str], bytes]:
        if repository in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        file = self.commits[repository, commit] / name
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(file)}"', "Content-Type": "application/octet-stream"}
        return 200, headers, file.read_bytes()


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def describe(folder: Path, name: str, **changes: Any) -> None:
    """Change entries of a JSON file of a model folder."""
    file = folder / name
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | changes))


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub behind `hub.url`, for the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            hub.asked.append(path)
            status, headers, body = hub.answer(path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
