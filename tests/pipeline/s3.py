"""A real S3 API on loopback (moto's server), and a proxy before it that does to requests what networks and clouds do."""

from __future__ import annotations

import contextlib
import http.client
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

BUCKET = "cohort-tests"
_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "not-a-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


@dataclass
class Fault:
    """What is done to the next `times` requests that match."""

    kind: str
    """drop: the connection is closed without an answer; truncate: half of the body is passed on as if it were all; cut: half of
    the answer is sent; flip: a bit of the answer's body; refuse: S3's error document; delay: a second passes."""
    method: str = ""
    part: str = ""
    """Of the path, such as `manifest.json`."""
    times: int = 1
    code: str = ""
    status: int = 503
    hours: float = 0.0
    """By which the server's date is moved in the error document."""
    seen: int = 0

    def meets(self, method: str, path: str) -> bool:
        """Whether it befalls this request."""
        wanted = self.seen < self.times and self.method in ("", method) and self.part in path
        self.seen += wanted
        return wanted


@dataclass
class Cloud:
    """The API behind the proxy."""

    endpoint: str
    direct: str
    """The API's own address, which no fault befalls."""
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of everything that was asked."""

    def url(self, folder: str | None = None) -> str:
        """A place for a store; without a name, a new one."""
        return f"s3://{BUCKET}/{folder or uuid.uuid4().hex}"

    def asked(self, method: str, part: str = "") -> int:
        """How many requests there were of a kind."""
        return sum(one == method and part in path for one, path in self.requests)


def environment(cloud: Cloud) -> dict[str, str]:
    """What lets a process find the API, and no other credentials than the tests'."""
    return {**_ENVIRONMENT, "AWS_ENDPOINT_URL": cloud.endpoint}


def use(monkeypatch: pytest.MonkeyPatch, cloud: Cloud) -> None:
    """Let this process find the API."""
    for name, value in environment(cloud).items():
        monkeypatch.setenv(name, value)


@contextlib.contextmanager
def serving() -> Iterator[Cloud]:
    """The API with one bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    cloud = Cloud("", f"http://{host}:{port}")
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler(cloud, lambda: http.client.HTTPConnection(host, port)))
    proxy.daemon_threads = True
    cloud.endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
    threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        connection = http.client.HTTPConnection(host, port)
        connection.request("PUT", f"/{BUCKET}")
        assert connection.getresponse().status == 200
        yield cloud
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.stop()


def _handler(cloud: Cloud, connect: Callable[[], http.client.HTTPConnection]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            cloud.requests.append((self.command, self.path))
            fault = next((one for one in cloud.faults if one.meets(self.command, self.path)), None)
            kind = fault.kind if fault else ""
            if kind == "drop":
                self.close_connection = True
                return
            if kind == "delay":
                time.sleep(1.0)
            if kind == "refuse":
                assert fault is not None
                self._refuse(fault)
                return
            self._pass_on(body[: len(body) // 2] if kind == "truncate" else body, kind)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_request

        def _pass_on(self, body: bytes, kind: str) -> None:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in ("expect",)}
            headers["Content-Length"] = str(len(body))
            upstream = connect()
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            data = answer.read()
            if kind == "flip" and data:
                data = bytes([data[0] ^ 1]) + data[1:]
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "server", "date"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if kind == "cut" else data)
            self.close_connection = self.close_connection or kind == "cut"
            upstream.close()

        def _refuse(self, fault: Fault) -> None:
            document = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>As S3 says it</Message></Error>"
            self.send_response_only(fault.status)
            self.send_header("Date", formatdate(time.time() + 3600 * fault.hours, usegmt=True))
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", "0" if self.command == "HEAD" else str(len(document)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(document.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    return Handler
