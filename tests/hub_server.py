"""A server that speaks as much of the Hub's protocol as uploads need, and keeps what it is given."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(BaseHTTPRequestHandler):
    """Keeps the files and messages of all commits."""

    commits: list[tuple[str, dict[str, bytes]]] = []
    created: list[dict] = []
    refuses = 0  # so many commits are answered with an error

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            self.answer({"url": f"http://{self.headers['Host']}/me/model"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.answer({"files": modes})
        elif "/commit/" in self.path and type(self).refuses:
            type(self).refuses -= 1
            self.answer({"error": "out of order"}, 400)
        elif "/commit/" in self.path:
            entries = [json.loads(line) for line in body.splitlines()]
            files = {
                entry["value"]["path"]: base64.b64decode(entry["value"]["content"])
                for entry in entries
                if entry["key"] == "file"
            }
            self.commits.append((entries[0]["value"]["summary"], files))
            self.answer(
                {"commitUrl": f"http://{self.headers['Host']}/me/model/commit/{'1' * 40}", "commitOid": "1" * 40}
            )
        else:
            self.answer({"error": self.path}, 404)

    def do_GET(self) -> None:
        self.answer({"sha": "1" * 40, "id": "me/model", "siblings": []})

    def answer(self, content: dict, code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serve_hub() -> Iterator[str]:
    """Starts a server without commits; gives its address."""
    Hub.commits, Hub.created, Hub.refuses = [], [], 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
