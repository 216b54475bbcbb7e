"""A registry of images that has just one, in which there is no program: for tests of what an engine fetches."""

import contextlib
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Registry(BaseHTTPRequestHandler):
    """A registry with one image, which holds no file."""

    blobs: dict[str, bytes]
    manifest: bytes

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        digest = self.path.rpartition("/")[2]
        status, kind = 200, "application/octet-stream"
        if self.path == "/v2/":
            content = b"{}"
        elif self.path.startswith("/v2/good/manifests/"):
            content, kind = self.manifest, "application/vnd.docker.distribution.manifest.v2+json"
        elif digest in self.blobs:
            content = self.blobs[digest]
        else:
            status, content = 404, b'{"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}'
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Docker-Content-Digest", f"sha256:{hashlib.sha256(content).hexdigest()}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """To nobody."""


@contextlib.contextmanager
def serving() -> Iterator[tuple[str, str]]:
    """One on the loopback, where engines ask for no certificate: its address, and the digest of its image `good`."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("empty"))
    configuration = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer.getvalue()).hexdigest()}"]},
        }
    ).encode()
    parts = [("container.image.v1+json", configuration), ("image.rootfs.diff.tar", layer.getvalue())]
    entries = [
        {
            "mediaType": f"application/vnd.docker.{kind}",
            "size": len(content),
            "digest": f"sha256:{hashlib.sha256(content).hexdigest()}",
        }
        for kind, content in parts
    ]
    Registry.blobs = {entry["digest"]: content for entry, (_, content) in zip(entries, parts, strict=True)}
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    manifest = {"schemaVersion": 2, "mediaType": kind, "config": entries[0], "layers": entries[1:]}
    Registry.manifest = json.dumps(manifest).encode()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", f"sha256:{hashlib.sha256(Registry.manifest).hexdigest()}"
    finally:
        server.shutdown()
        server.server_close()
