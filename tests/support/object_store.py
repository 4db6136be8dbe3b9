"""An object store in a process of its own, for tests: python -m tests.support.object_store.

It is gcp-storage-emulator, with what Google's store has and the emulator lacks: writes and
deletions that depend on an object's generation (`ifGenerationMatch`), and the generation beside the
content that is read. It can also fail on request, see `ObjectStore.fail`.
"""

import functools
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from http import server
from urllib.parse import parse_qs, unquote, urlparse

BUCKET = "bucket"


def _main() -> None:
    import gcp_storage_emulator.server as emulator
    from gcp_storage_emulator.handlers import buckets
    from gcp_storage_emulator.storage import Storage

    class Handler(emulator.RequestHandler):
        """Answers like Google's store."""

        faults: dict = {}
        one = threading.Lock()  # the emulator's own server answers one request at a time

        def do_GET(self):
            with self.one:
                self._answer(super().do_GET)

        def do_POST(self):
            with self.one:
                self._answer(super().do_POST)

        def do_PUT(self):
            if self.path == "/faults":
                length = int(self.headers["Content-Length"])
                Handler.faults = json.loads(self.rfile.read(length))
                self._refuse(200, "")
                return
            with self.one:
                self._answer(super().do_PUT)

        def do_DELETE(self):
            with self.one:
                self._answer(super().do_DELETE)

        def _answer(self, usual) -> None:
            faults, writes = Handler.faults, self.command != "GET"
            if time.time() < faults.get("until", 0):
                self._refuse(503, "Service Unavailable")
            elif faults.get("read_only") and writes:
                self._refuse(403, "tester does not have storage.objects.create access")
            elif faults.get("unknown_caller"):
                self._refuse(401, "Anonymous caller does not have storage.objects.get access")
            elif faults.get("lose_answers") and self._expected() is not None:
                Handler.faults = faults | {"lose_answers": faults["lose_answers"] - 1}
                self.wfile, answers = open(os.devnull, "wb"), self.wfile
                if self._holds():
                    usual()
                self.wfile = answers
                del self.headers["Content-Length"]  # the body was read
                self._refuse(503, "Service Unavailable")
            elif self._holds():
                usual()
            else:
                self._refuse(412, "conditionNotMet")

        def _expected(self) -> int | None:
            query = parse_qs(urlparse(self.path).query)
            return int(query["ifGenerationMatch"][0]) if "ifGenerationMatch" in query else None

        def _holds(self) -> bool:
            """Whether the object has the generation that the request expects."""
            expected = self._expected()
            return expected is None or self._generation() == expected

        def _generation(self) -> int:
            """The generation of the object that the request is about, 0 if there is none."""
            url = urlparse(self.path)
            parts = url.path.partition("/b/")[2].split("/", 2)
            query = parse_qs(url.query)
            name = query["name"][0] if "name" in query else unquote(parts[2])
            try:
                return int(self.storage.get_file_obj(parts[0], name)["generation"])
            except Exception:  # there is none
                return 0

        def end_headers(self):
            if self.command == "GET" and "alt=media" in self.path:
                self.send_header("x-goog-generation", str(self._generation()))
            super().end_headers()

        def _refuse(self, code: int, message: str) -> None:
            # The body is read, or the client sees a broken connection.
            if length := int(self.headers.get("Content-Length") or 0):
                if code != 200:
                    self.rfile.read(length)
            body = json.dumps({"error": {"code": code, "message": message}}).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

    # The tests' end, even by kill -9, ends the input.
    threading.Thread(target=lambda: os._exit(len(sys.stdin.read())), daemon=True).start()
    storage = Storage(use_memory_fs=True)
    storage._write_config_to_file = lambda: None  # a list of all objects, at every write
    buckets.create_bucket(BUCKET, storage)
    server.ThreadingHTTPServer.request_queue_size = 128
    handler = functools.partial(Handler, storage)
    listening = server.ThreadingHTTPServer(("localhost", 0), handler)
    print(listening.server_port, flush=True)
    sys.stdout = open(os.devnull, "w")  # nobody reads on
    listening.serve_forever()


class ObjectStore:
    """The store, as a context manager that sets the variables by which clients find it."""

    def __enter__(self) -> "ObjectStore":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.object_store"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        port = self._process.stdout.readline()
        assert port, "the store's process ended"
        self.url = f"http://localhost:{int(port)}"
        self.variables = {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
        }
        self._before = {name: os.environ.get(name) for name in self.variables}
        os.environ.update(self.variables)
        return self

    def __exit__(self, *error) -> None:
        for name, value in self._before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        self._process.stdin.close()
        self._process.wait()

    def fail(self, **faults) -> None:
        """From now on: `until` a time answer 503; `read_only`; `unknown_caller`; or perform the
        next `lose_answers` conditional requests but answer 503. Without any, work again."""
        data = json.dumps(faults).encode()
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/faults", data, method="PUT"))


if __name__ == "__main__":
    _main()
