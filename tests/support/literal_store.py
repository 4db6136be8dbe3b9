"""A small object store that takes names as they are: `a/../../x` is an object like any other.

Google's store does so, too. It answers what gcsfs asks to look at objects, to list and to read
them.
"""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class _Handler(BaseHTTPRequestHandler):
    objects: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        url = urlsplit(self.path)
        bucket, _, name = url.path.partition("/b/")[2].partition("/o")
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if not name.strip("/"):
            self._answer(json.dumps(self._listing(bucket, query)).encode())
        elif (content := self.objects.get(unquote(name[1:]))) is None:
            self._answer(b"{}", 404)
        elif query.get("alt") == "media" or "/download/" in url.path:
            self._answer(content)
        else:
            self._answer(json.dumps(self._described(bucket, unquote(name[1:]))).encode())

    def _listing(self, bucket: str, query: dict[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        found, folders = [], set()
        for name in sorted(self.objects):
            rest = name.removeprefix(prefix)
            if not name.startswith(prefix):
                continue
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                found.append(self._described(bucket, name))
        return {"kind": "storage#objects", "items": found, "prefixes": sorted(folders)}

    def _described(self, bucket: str, name: str) -> dict:
        time = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "id": f"{bucket}/{name}/1",
            "size": str(len(self.objects[name])),
            "generation": "1",
            "updated": time,
            "timeCreated": time,
        }

    def _answer(self, content: bytes, code: int = 200) -> None:
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if code == 200 and first:
            whole, code = content, 206
            content = whole[int(first) : int(last) + 1 if last else None]
        self.send_response(code)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def literal_store(objects: dict[str, bytes]) -> Iterator[str]:
    """Serves the objects of one bucket; yields the address for STORAGE_EMULATOR_HOST."""
    handler = type("Handler", (_Handler,), {"objects": objects})
    with ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://localhost:{server.server_port}"
        finally:
            server.shutdown()
