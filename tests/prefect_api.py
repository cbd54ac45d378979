"""Asking the local Prefect server as its own pages do: with its password, and a CSRF token for what may change something."""

from __future__ import annotations

import base64
import json
import os
import urllib.request
from typing import Any


def ask(url: str, body: Any = None) -> Any:
    """What the server answers at a URL of its API: to a GET, or to a POST of a body."""
    headers = {"Authorization": f"Basic {base64.b64encode(os.environ['PREFECT_API_AUTH_STRING'].encode()).decode()}"}
    data = None
    if body is not None:
        token = ask(f"{url.partition('/api/')[0]}/api/csrf-token?client=tests")["token"]
        headers |= {"Prefect-Csrf-Client": "tests", "Prefect-Csrf-Token": token, "Content-Type": "application/json"}
        data = json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data=data, headers=headers), timeout=60) as answer:
        return json.load(answer)
