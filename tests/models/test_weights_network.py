"""Fetching weights over a network that fails: a server speaks the hub's protocol and breaks it in one way per repository.

The hub's client reads its environment when imported, so fetching happens in processes of their own.
"""

import contextlib
import hashlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
FILE = (GOLDEN / "tiny_zip.pth").read_bytes()
SHA = hashlib.sha256(FILE).hexdigest()
COMMIT = "c0ffee" * 6 + "c0ff"
WAYS_OUT = "give a local file (`model.weights: PATH`), use the offline backbone"


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub with one file, whose repositories are named after what goes wrong with them; `store` sends the bytes."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.seen()
        kind, token = self.kind(), self.headers.get("Authorization")
        if kind == "silent":
            time.sleep(4)
        refusal = {
            "missing": (401, {"X-Error-Code": "RepoNotFound"}),
            "no-file": (404, {"X-Error-Code": "EntryNotFound"}),
            "forbidden": (403, {}),
            "busy": (429, {"Retry-After": "17"}),
            "out-of-order": (500, {}),
            "proxy-login": (407, {"Proxy-Authenticate": "Basic"}),
        }.get(kind)
        if kind == "gated" and token != "Bearer right":
            refusal = (403 if token == "Bearer stranger" else 401, {"X-Error-Code": "GatedRepo"})
            if token == "Bearer wrong":
                refusal = (401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        if refusal:
            self.answer(*refusal)
        elif kind == "portal":
            self.answer(200, {"ETag": '"welcome"', "Content-Type": "text/html"})
        else:
            size = 10**15 if kind == "huge" else len(FILE)
            self.answer(
                302, {"Location": f"{self.server.store}/{kind}", "X-Linked-Size": size, "X-Linked-ETag": f'"{SHA}"'}
            )

    def do_GET(self):
        self.seen()
        kind, begin = self.kind(), int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        count = sum(1 for method, path, _ in self.server.log if method == "GET" and path == self.path)
        body, first = FILE[begin:], count == 1
        if kind == "busy-then-good" and first:
            return self.answer(429, {"Retry-After": "0"})
        if kind == "store-out-of-order":
            return self.answer(500, {})
        if kind == "other-bytes":
            body = bytes(len(FILE))
        if kind == "short":
            body = body[:100]
        length = 0 if kind == "breaks-always" else len(body) // 2 if "breaks" in kind or "hangs" in kind else len(body)
        length = length if first or "always" in kind else len(body)
        headers = {"Content-Range": f"bytes {begin}-{len(FILE) - 1}/{len(FILE)}"} if begin else {}
        self.answer(206 if begin else 200, headers, size=len(body))
        self.wfile.write(body[:length])
        self.wfile.flush()
        if "hangs" in kind and length < len(body):
            self.server.hanging.set()
            self.server.released.wait(8)
        self.close_connection = length < len(body)

    def kind(self) -> str:
        """Of /owner/KIND/resolve/main/FILE at the hub, and of /KIND at the store."""
        parts = self.path.strip("/").split("/")
        return parts[1] if len(parts) > 2 else parts[0]

    def seen(self):
        if "://" in self.path:  # asked as a proxy
            self.server.proxied.append(self.path)
            self.path = "/" + self.path.partition("://")[2].partition("/")[2]
        self.server.log.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))

    def answer(self, status: int, headers: dict, size: int = 0):
        self.send_response(status)
        for name, value in (
            {"X-Repo-Commit": COMMIT} if status in (200, 302) and self.kind() != "portal" else {}
        ).items():
            self.send_header(name, value)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.send_header("Content-Length", str(size))
        self.end_headers()

    def handle(self):
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.url = server.store = f"http://127.0.0.1:{server.server_port}"
    server.log, server.proxied = [], []
    server.hanging, server.released = threading.Event(), threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub():
    """A hub and, on another port, as the real one has it, the store that its files are in."""
    with serving() as server, serving() as store:
        server.store, server.files = store.url, store
        yield server


FETCH = """if True:
    import concurrent.futures, errno, json, os, sys
    import huggingface_hub
    from huggingface_hub import file_download
    from jaxcats import errors, models
    download = file_download.http_get

    def full_disk(url, temp_file, **how):
        if url.endswith("/full-disk"):
            temp_file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return download(url, temp_file, **how)

    file_download.http_get = full_disk
    file_download.constants.DOWNLOAD_CHUNK_SIZE = 1000  # what has come is counted in these, 10 MB otherwise

    def fetch(kind):
        try:
            return models.find_weights("resnet18", f"hf:owner/{kind}/tiny.pth").sha256
        except errors.UserError as error:
            return str(error)

    said = []
    for environment, kinds in json.loads(sys.argv[1]):
        huggingface_hub.close_session()
        os.environ.update(environment)
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            said.append(dict(zip(kinds, pool.map(fetch, kinds))))
    print(json.dumps(said))"""


def start(steps: list[tuple[dict, list[str]]], home: Path, **environment: str) -> subprocess.Popen:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()}
    kept |= {"HF_HOME": str(home), "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1", **environment}
    command = [sys.executable, "-c", FETCH, json.dumps(steps)]
    return subprocess.Popen(command, env=kept, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fetch(steps: list[tuple[dict, list[str]]], home: Path, **environment: str) -> tuple[list[dict[str, str]], str]:
    """What find_weights says for each kind of repository, a dict per step, and what went to stderr."""
    with start(steps, home, **environment) as process:
        out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    return json.loads(out), err


def assert_only_whole_files(home: Path, repositories: set[str]):
    """The cache has the file of these repositories, right to the last byte, and nothing else: no part of another."""
    blobs = [path for path in (home / "hub").glob("models--*/blobs/*") if path.is_file()]
    assert all(path.read_bytes() == FILE for path in blobs)
    assert {path.parts[-3].removeprefix("models--owner--") for path in blobs} == repositories
    pointers = [path for path in (home / "hub").glob("models--*/snapshots/*/*") if path.exists()]
    assert {path.parts[-4].removeprefix("models--owner--") for path in pointers} == repositories


QUICK = {  # what a user is told, by what went wrong
    "gated": "hf:owner/gated/tiny.pth: the hub asks for a login to read owner/gated; run `hf auth login` or set HF_TOKEN",
    "forbidden": "the hub asks for a login to read owner/forbidden",
    "missing": f"the hub has no owner/missing for you to read; check the name, or {WAYS_OUT}",
    "no-file": f"the hub has no file tiny.pth in owner/no-file; check the name, or {WAYS_OUT}",
    "busy": "refuses more requests for now (429): try again in 17 s (after a login it allows more: HF_TOKEN), or give",
    "out-of-order": f"is out of order (HTTP 500): try again later, or {WAYS_OUT}",
    "store-out-of-order": "is out of order (HTTP 500): try again later",
    "portal": "answers, but not as the hub does: check HF_ENDPOINT",
    "silent": "is not in the cache and the Hugging Face hub can't be reached (",
    "other-bytes": f"what came is not what the hub announced (sha256 {hashlib.sha256(bytes(len(FILE))).hexdigest()}, ",
    "short": "the download broke off (Consistency check failed",
    "huge": "no room for it (1000000000.0 MB) in ",
    "full-disk": "no room for it (",
}
RECOVER = ["good", "busy-then-good", "breaks-once", "hangs-once"]


def test_every_fault_is_one_line_with_a_way_out_and_leaves_nothing(hub, tmp_path):
    (said, again), err = fetch(
        [({}, [*QUICK, *RECOVER]), ({}, ["other-bytes", "full-disk"])],
        tmp_path,
        HF_ENDPOINT=hub.url,
        TQDM_POSITION="-1",  # the bar is drawn where there is no terminal, too
    )
    for kind, words in QUICK.items():
        assert words in said[kind], (kind, said[kind])
        assert "\n" not in said[kind]
    assert {kind: said[kind] for kind in RECOVER} == dict.fromkeys(RECOVER, SHA)
    assert again == {kind: said[kind] for kind in again}  # not taken for fetched the second time
    assert_only_whole_files(tmp_path, set(RECOVER))
    assert f"Fetching tiny.pth of owner/good (0.0 MB) from {hub.url[7:]}" in err
    assert "100%" in err
    ranges = {path[1:]: headers["range"] for _, path, headers in hub.files.log if "range" in headers}
    assert ranges == dict.fromkeys(["breaks-once", "hangs-once"], f"bytes={len(FILE) // 2 // 1000 * 1000}-")


def test_the_command_fetches_ahead_and_says_what_is_not_there(hub, tmp_path):
    argv = ["fetch", "hf:owner/good/tiny.pth", "hf:owner/missing/tiny.pth"]
    command = [sys.executable, "-m", "jaxcats.weights", *argv]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "no_proxy": "*"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout.startswith(f"hf:owner/good/tiny.pth: {tmp_path}")
    assert f"sha256 {SHA})" in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: hf:owner/missing/tiny.pth: the hub has no owner/missing for you to read")
    assert "Traceback" not in done.stderr
    assert_only_whole_files(tmp_path, {"good"})


def test_a_token_opens_a_gated_repository_and_stays_with_the_hub(hub, tmp_path):
    steps = [({"HF_TOKEN": token}, ["gated"]) for token in ("wrong", "stranger", "right")]
    (wrong, stranger, right), _ = fetch(steps, tmp_path, HF_ENDPOINT=hub.url)
    assert "the hub does not accept your token for owner/gated; run `hf auth login` again" in wrong["gated"]
    assert "the hub does not let you read owner/gated; accept its terms on its page" in stranger["gated"]
    assert right["gated"] == SHA
    assert any(headers.get("authorization") == "Bearer right" for _, _, headers in hub.log)
    assert hub.files.log
    assert not any("authorization" in headers for _, _, headers in hub.files.log)


def test_a_proxy_is_used_and_named_when_it_fails(hub, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    steps = [
        ({"HTTP_PROXY": f"http://127.0.0.1:{closed}"}, ["good"]),
        ({"HTTP_PROXY": hub.url}, ["proxy-login", "good"]),
    ]
    (dead, alive), _ = fetch(steps, tmp_path, HF_ENDPOINT="http://hub.invalid")  # a name that only a proxy could know
    assert "can't be reached (" in dead["good"]
    assert ", via HF_ENDPOINT and HTTP_PROXY): give a local file" in dead["good"]
    assert "the proxy asks for a login: put it in HTTPS_PROXY" in alive["proxy-login"]
    assert alive["good"] == SHA
    assert "http://hub.invalid/owner/good/resolve/main/tiny.pth" in hub.proxied
    (offline,), _ = fetch([({}, ["good"])], tmp_path, HF_ENDPOINT="http://hub.invalid", HF_HUB_OFFLINE="1")
    assert offline["good"] == SHA


@pytest.mark.slow
def test_a_connection_that_never_recovers_is_given_up(hub, tmp_path):
    begin = time.monotonic()
    (said,), err = fetch([({}, ["breaks-always", "hangs-always"])], tmp_path, HF_ENDPOINT=hub.url)
    assert time.monotonic() - begin < 60
    assert "Trying to resume download" in err  # the wait is explained while it lasts
    assert "the download broke off (" in said["breaks-always"]
    assert "what came is not used: try again, or give a local file" in said["breaks-always"]
    assert_only_whole_files(tmp_path, {kind for kind, words in said.items() if words == SHA})


@pytest.mark.slow
def test_a_killed_download_is_not_taken_for_the_file(hub, tmp_path):
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    with start([({}, ["hangs-once"])], tmp_path, **environment) as process:
        assert hub.files.hanging.wait(60)
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
    (offline,), _ = fetch([({}, ["hangs-once"])], tmp_path, HF_HUB_OFFLINE="1", **environment)
    assert "offline mode: HF_HUB_OFFLINE is set" in offline["hangs-once"]
    (said,), _ = fetch([({}, ["hangs-once"])], tmp_path, **environment)
    assert said["hangs-once"] == SHA
