"""Fetching weights over a network that fails: a server speaks the hub's protocol and breaks it in one way per repository.

The hub's client reads its environment when imported, so fetching happens in processes of their own.
"""

import contextlib
import fcntl
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from jaxcats import models
from jaxcats.common.errors import UserError
from jaxcats.models import hub as hub_module

GOLDEN = Path(__file__).parents[1] / "golden"
FILE = (GOLDEN / "tiny_zip.pth").read_bytes()
SHA = hashlib.sha256(FILE).hexdigest()
HALF = len(FILE) // 2
COMMIT = "c0ffee" * 6 + "c0ff"
WAYS_OUT = "give a local file (`model.weights: PATH`), use the offline backbone"


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub with one file, whose repositories are named after what goes wrong with them; `store` sends the bytes."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.seen()
        kind, token = self.kind(), self.headers.get("Authorization")
        if kind == "silent":
            self.server.released.wait(15)
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
            facts = {"Location": f"{self.server.store}/{kind}", "X-Linked-Size": size, "X-Linked-ETag": f'"{SHA}"'}
            if kind == "xet":  # offered, and out of reach
                facts |= {"X-Xet-Hash": "ab" * 32, "Link": f'<{self.server.url}/xet-auth>; rel="xet-auth"'}
            self.answer(302, facts)

    def do_GET(self):
        self.seen()
        kind, begin = self.kind(), int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        if "/resolve/" in self.path:
            return self.answer(302, {"Location": f"{self.server.store}/{kind}"})
        count = sum(1 for method, path, _ in self.server.log if method == "GET" and path == self.path)
        first, refusal = count == 1, {"store-out-of-order": 500, "store-without": 404, "xet-auth": 500}.get(kind)
        if kind == "busy-then-good" and first:
            return self.answer(429, {"Retry-After": "0"})
        if refusal:
            return self.answer(refusal, {})
        begin = 0 if kind in ("breaks-and-knows-no-range", "short") else begin
        body = bytes(len(FILE))[begin:] if kind == "other-bytes" else FILE[begin:]
        body = body[:100] if kind == "short" else body
        broken = kind.startswith(("breaks", "resets", "hangs")) and (first or "always" in kind)
        length = 0 if broken and not first else len(body) // 2 if broken or kind == "drips" else len(body)
        headers = {"Content-Range": f"bytes {begin}-{len(FILE) - 1}/{len(FILE)}"} if begin else {}
        self.answer(206 if begin else 200, headers, size=len(body))
        self.wfile.write(body[:length])
        if kind == "drips":
            while length < len(body) - 1 and not self.server.released.wait(0.2):
                self.wfile.write(body[length : length + 1])
                length += 1
            return self.wfile.write(body[length:])
        if broken:
            self.break_off(kind)

    def break_off(self, kind: str):
        self.close_connection = True
        if kind.startswith("hangs"):
            self.server.released.wait(60)
        if kind.startswith("resets"):
            while struct.unpack("i", fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4)))[0]:
                time.sleep(0.01)  # until the other side has it all
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

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
        if status in (200, 302) and self.kind() != "portal":
            headers = {"X-Repo-Commit": COMMIT, **headers}
        for name, value in {**headers, "Content-Length": size}.items():
            self.send_header(name, str(value))
        self.end_headers()

    def handle(self):
        with contextlib.suppress(OSError):
            super().handle()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.url = server.store = f"http://127.0.0.1:{server.server_port}"
    server.log, server.proxied, server.released = [], [], threading.Event()
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


class Fault(NamedTuple):
    """What goes wrong: with which repository and variables, what is said, the exit code, what the cache is left with."""

    repository: str
    says: str
    code: int = 1
    left: str = ""  # or "part", or "file"
    environment: Mapping[str, str] = {}


PROXIED = "http://hub.invalid"  # a name that only a proxy could know
REFUSES = "refuses it (403): a proxy or filter may stand between, or the repository wants a login (HF_TOKEN)"
FAULTS = {
    "no network": Fault(
        "good",
        f"reached ([Errno 111] Connection refused, via HF_ENDPOINT): {WAYS_OUT}",
        1,
        "",
        {"HF_ENDPOINT": "{closed}"},
    ),
    "offline switch": Fault(
        "good", f"(offline mode: HF_HUB_OFFLINE is set): {WAYS_OUT}", 2, "", {"HF_HUB_OFFLINE": "1"}
    ),
    "wrong mirror": Fault("portal", "{hub} answers, but not as the hub does: check HF_ENDPOINT, or give", 2),
    "proxy down": Fault(
        "good",
        f"can't be reached ([Errno 111] Connection refused, via HF_ENDPOINT and HTTP_PROXY): {WAYS_OUT}",
        1,
        "",
        {"HF_ENDPOINT": PROXIED, "HTTP_PROXY": "{closed}"},
    ),
    "proxy login": Fault(
        "proxy-login",
        "the proxy asks for a login: put it in HTTPS_PROXY, as in http://NAME:WORD@HOST:PORT",
        2,
        "",
        {"HF_ENDPOINT": PROXIED, "HTTP_PROXY": "http://{hub}"},
    ),
    "no such repository": Fault(
        "missing", f"the hub has no owner/missing for you to read; check the name, or {WAYS_OUT}", 2
    ),
    "no such file": Fault(
        "no-file", f"the hub has no file tiny.pth in owner/no-file; check the name, or {WAYS_OUT}", 2
    ),
    "gated, no token": Fault(
        "gated", "the hub asks for a login to read owner/gated; run `hf auth login` or set HF_TOKEN", 2
    ),
    "gated, wrong token": Fault(
        "gated",
        "the hub does not accept your token for owner/gated; run `hf auth login` again, or set HF_TOKEN anew",
        2,
        "",
        {"HF_TOKEN": "wrong"},
    ),
    "gated, not accepted": Fault(
        "gated",
        "the hub does not let you read owner/gated; accept its terms on its page, or use a token (HF_TOKEN) that may",
        2,
        "",
        {"HF_TOKEN": "stranger"},
    ),
    "403": Fault("forbidden", f"{{hub}} {REFUSES}; or {WAYS_OUT}", 2),
    "429": Fault(
        "busy", "{hub} refuses more requests for now (429): try again in 17 s (after a login the hub allows more"
    ),
    "429 once": Fault("busy-then-good", SHA, 0, "file"),
    "500 of the hub": Fault("out-of-order", f"{{hub}} is out of order (HTTP 500): try again later, or {WAYS_OUT}"),
    "500 of the store": Fault(
        "store-out-of-order", f"{{store}} is out of order (HTTP 500): try again later, or {WAYS_OUT}"
    ),
    "404 of the store": Fault(
        "store-without", f"{{store}} has not got what the hub announced (404): try again later, or {WAYS_OUT}"
    ),
    "slow to answer": Fault("silent", f"can't be reached (timed out, via HF_ENDPOINT): {WAYS_OUT}"),
    "Xet out of reach": Fault("xet", SHA, 0, "file"),
    "breaks off once": Fault("breaks-once", SHA, 0, "file"),
    "breaks off, no Range": Fault("breaks-and-knows-no-range", SHA, 0, "file"),
    "reset once": Fault("resets-once", SHA, 0, "file"),
    "hangs once": Fault("hangs-once", SHA, 0, "file"),
    "never recovers": Fault(
        "breaks-always",
        "the download from {store} broke off (peer closed connection without sending complete message body (received 0 "
        f"bytes, expected {len(FILE) - HALF})); what came is kept: run the same again to go on from there, or give",
        1,
        "part",
    ),
    "hangs for ever": Fault(
        "hangs-always",
        "the download from {store} broke off (timed out); what came is kept: run the same again to go on from there",
        1,
        "part",
    ),
    "killed, and given again": Fault("hangs-once", SHA, 0, "file"),
    "short body": Fault(
        "short", f"broke off (100 of {len(FILE):,} bytes came from {{store}}); what came is kept", 1, "part"
    ),
    "wrong hash": Fault(
        "other-bytes",
        f"what came is not what the hub announced (sha256 {hashlib.sha256(bytes(len(FILE))).hexdigest()}, expected "
        f"{SHA}); it is removed: try again, check HF_ENDPOINT and proxies, or {WAYS_OUT}",
    ),
    "full disk": Fault(
        "full-disk", "no room for it (0.0 MB) in {cache}; free some, or set HF_HOME to a folder on another"
    ),
    "too large for the disk": Fault(
        "huge", "no room for it (1000000000.0 MB) in {cache}; free some, or set HF_HOME to"
    ),
    "read-only cache": Fault(
        "good",
        "/proc/never can't be written (No such file or directory); set HF_HOME to a folder of your own, or give",
        2,
        "",
        {"HF_HOME": "/proc/never"},
    ),
}
ELSEWHERE = ("hangs for ever", "killed, and given again")  # in tests of their own, since they take long
LATE = ("HF_TOKEN", "HTTP_PROXY")  # the variables that are read at every request

FETCH = """if True:
    import concurrent.futures, json, os, sys
    import huggingface_hub
    from jaxcats import errors, models
    from jaxcats.models import transfer
    transfer.SAY_EVERY = 0

    def fetch(repository):
        try:
            return 0, models.find_weights("resnet18", f"hf:owner/{repository}/tiny.pth").sha256
        except errors.UserError as error:
            return 2, str(error)
        except errors.RunError as error:
            return 1, str(error)

    said = {}
    for environment, repositories in json.loads(sys.argv[1]):
        huggingface_hub.close_session()
        os.environ.update(environment)
        with concurrent.futures.ThreadPoolExecutor(30) as pool:
            said |= zip(repositories, pool.map(fetch, repositories.values()))
    print(json.dumps(said))"""


def kept(home: Path, **environment: str) -> dict[str, str]:
    """The environment of a process, less what it says of the hub and proxies."""
    rest = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()}
    return rest | {"HF_HOME": str(home), "HF_HUB_ETAG_TIMEOUT": "5", "HF_HUB_DOWNLOAD_TIMEOUT": "5", **environment}


def start(steps: list[tuple[dict, dict[str, str]]], home: Path, **environment: str) -> subprocess.Popen:
    """Find these weights (any name: repository), a step after the other, each with more variables."""
    command = [sys.executable, "-c", FETCH, json.dumps(steps)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=kept(home, **environment), stdout=pipe, stderr=pipe, text=True)


def end(process: subprocess.Popen) -> tuple[dict[str, tuple[int, str]], str]:
    """(exit code, words) by name, and what went to stderr."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return {name: tuple(answer) for name, answer in json.loads(out).items()}, err


def fetch(repository: str, home: Path, **environment: str) -> tuple[int, str]:
    """What one process says."""
    return end(start([({}, {"it": repository})], home, **environment))[0]["it"]


def answers(hub, home: Path, faults: Mapping[str, Fault], **environment: str) -> tuple[dict[str, tuple[int, str]], str]:
    """What is said to each of the faults; a process per set of variables that are read at import."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        places = {"hub": hub.url[7:], "closed": f"http://127.0.0.1:{server.getsockname()[1]}"}
    groups: dict[str, list] = {}
    for name, fault in faults.items():
        variables = {key: value.format(**places) for key, value in fault.environment.items()}
        early = {"HF_ENDPOINT": hub.url, **{k: v for k, v in variables.items() if k not in LATE}}
        late = {k: v for k, v in variables.items() if k in LATE}
        steps = groups.setdefault(json.dumps(early), [])
        if not steps or steps[-1][0] != late:
            steps.append((late, {}))
        steps[-1][1][name] = fault.repository
    started = []
    for i, (early, steps) in enumerate(groups.items()):
        variables = json.loads(early)
        place = home if list(variables) == ["HF_ENDPOINT"] and variables["HF_ENDPOINT"] == hub.url else home / str(i)
        started.append(start(steps, place, **{**environment, **variables}))
    ended = [end(process) for process in started]
    return {name: said for group, _ in ended for name, said in group.items()}, "".join(err for _, err in ended)


def wrong(said: Mapping[str, tuple[int, str]], hub, home: Path) -> dict[str, tuple[int, str]]:
    """The answers that are not those of the table, or not one line."""
    places = {"hub": hub.url[7:], "store": hub.files.url[7:], "cache": str(home / "hub")}
    right = {name: FAULTS[name].says.format(**places) in words for name, (_, words) in said.items()}
    return {
        name: (code, words)
        for name, (code, words) in said.items()
        if not right[name] or code != FAULTS[name].code or "\n" in words
    }


def left(home: Path) -> dict[str, str]:
    """What the cache has of each repository that it has something of: the file, right to the last byte, or a part."""
    found = {}
    for path in (home / "hub").glob("models--*/blobs/*"):
        repository = path.parts[-3].removeprefix("models--owner--")
        assert repository not in found, "there is more than one blob"
        found[repository] = {SHA: "file", f"{SHA}.part": "part"}[path.name]
        assert path.read_bytes() == (FILE if path.name == SHA else FILE[: path.stat().st_size])
    pointers = {path.parts[-4] for path in (home / "hub").glob("models--*/snapshots/*/*") if path.exists()}
    assert pointers == {f"models--owner--{repository}" for repository, what in found.items() if what == "file"}
    return found


def ranges(hub) -> dict[str, list[str]]:
    """The Range of each request to the store that had one, by repository."""
    found: dict[str, list[str]] = {}
    for method, path, headers in hub.files.log:
        if method == "GET" and "range" in headers:
            found.setdefault(path[1:], []).append(headers["range"])
    return found


def test_every_fault_is_one_line_with_a_way_out_and_leaves_what_the_table_says(hub, tmp_path):
    faults = {"good": Fault("good", SHA, 0, "file"), **FAULTS}
    faults = {name: fault for name, fault in faults.items() if name not in ELSEWHERE}
    full = tmp_path / "hub/models--owner--full-disk/blobs" / f"{SHA}.part"
    full.parent.mkdir(parents=True)
    full.symlink_to("/dev/full")
    said, err = answers(hub, tmp_path, faults)
    assert said.pop("good") == (0, SHA)
    assert wrong(said, hub, tmp_path) == {}
    assert left(tmp_path) == {fault.repository: fault.left for fault in faults.values() if fault.left}
    asked, half = ranges(hub), [f"bytes={HALF}-"]
    for kind in ("breaks-once", "resets-once", "hangs-once", "breaks-and-knows-no-range"):
        assert asked[kind] == half
    assert asked["breaks-always"] == half * 5
    assert not any("xet-auth" in path for _, path, _ in hub.log)
    assert f"Fetching tiny.pth of owner/good (0.0 MB) from {hub.url[7:]}\n" in err
    assert "tiny.pth: 0.0 of 0.0 MB\n" in err
    assert "tiny.pth: broke off ([Errno 104] Connection reset by peer); going on from 0.0 MB\n" in err
    # What was refused is not taken for fetched the second time, and what came is not asked for again.
    again = {name: faults[name] for name in ("wrong hash", "breaks off once", "never recovers")}
    before = len(hub.files.log)
    said, err = answers(hub, tmp_path, again)
    assert wrong(said, hub, tmp_path) == {}
    assert {path for _, path, _ in hub.files.log[before:]} == {"/other-bytes", "/breaks-always"}
    assert ranges(hub)["breaks-always"][5] == half[0]


@pytest.mark.slow
def test_a_server_that_always_hangs_is_given_up(hub, tmp_path):
    begin = time.monotonic()
    said, _ = answers(hub, tmp_path, {"hangs for ever": FAULTS["hangs for ever"]}, HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert time.monotonic() - begin < 60
    assert wrong(said, hub, tmp_path) == {}
    assert left(tmp_path) == {"hangs-always": "part"}


def wait_for_half(home: Path, repository: str, process: subprocess.Popen):
    part = home / f"hub/models--owner--{repository}/blobs/{SHA}.part"
    until = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size >= HALF):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_download_is_gone_on_with_by_the_next_process(hub, tmp_path):
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    with start([({}, {"it": "hangs-once"})], tmp_path, **environment) as process:
        wait_for_half(tmp_path, "hangs-once", process)
        process.send_signal(signal.SIGKILL)
    assert left(tmp_path) == {"hangs-once": "part"}
    code, words = fetch("hangs-once", tmp_path, HF_HUB_OFFLINE="1", **environment)
    assert (code, "offline mode: HF_HUB_OFFLINE is set" in words) == (2, True)  # a part is not taken for the file
    said = {"killed, and given again": fetch("hangs-once", tmp_path, **environment)}
    assert wrong(said, hub, tmp_path) == {}
    assert ranges(hub)["hangs-once"] == [f"bytes={HALF}-"]
    assert left(tmp_path) == {"hangs-once": "file"}


@pytest.mark.slow
def test_two_processes_fetch_a_file_once(hub, tmp_path):
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    with start([({}, {"it": "hangs-once"})], tmp_path, **environment) as first:
        wait_for_half(tmp_path, "hangs-once", first)
        with start([({}, {"it": "hangs-once"})], tmp_path, **environment) as second:
            line = second.stderr.readline()
            assert line.startswith("Waiting for another process that fetches tiny.pth (its lock: ")
            hub.files.released.set()
            assert [end(process)[0]["it"] for process in (first, second)] == [(0, SHA), (0, SHA)]
    assert [headers.get("range") for _, _, headers in hub.files.log] == [None, f"bytes={HALF}-"]
    assert left(tmp_path) == {"hangs-once": "file"}


def test_a_bar_moves_on_a_slow_line_and_has_the_files_name(hub, tmp_path):
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    command = [sys.executable, "-m", "jaxcats.weights", "fetch", "hf:owner/drips/tiny.pth"]
    environment = kept(tmp_path, HF_ENDPOINT=hub.url)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        while b"50%" not in seen:
            seen += os.read(ours, 1000)  # fails at the end of the process
        hub.files.released.set()
        with contextlib.suppress(OSError):
            while more := os.read(ours, 1000):
                seen += more
        assert process.wait(60) == 0
    os.close(ours)
    assert b"\rtiny.pth:  50%|" in seen
    assert b"100%" in seen
    assert hub.files.url.encode() not in seen


def test_the_command_fetches_ahead_and_says_what_is_not_there(hub, tmp_path):
    def run(*repositories: str) -> subprocess.CompletedProcess:
        argv = [f"hf:owner/{repository}/tiny.pth" for repository in repositories]
        command = [sys.executable, "-m", "jaxcats.weights", "fetch", *argv]
        environment = kept(tmp_path, HF_ENDPOINT=hub.url)
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    done = run("good", "missing")
    assert done.returncode == 2
    assert done.stdout.startswith(f"hf:owner/good/tiny.pth: {tmp_path}")
    assert f"sha256 {SHA})" in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: hf:owner/missing/tiny.pth: the hub has no owner/missing for you to read")
    assert left(tmp_path) == {"good": "file"}
    later = run("busy")
    assert (later.returncode, later.stderr.count("\n")) == (1, 1)
    assert later.stderr.startswith("stopped: hf:owner/busy/tiny.pth: ")


def test_a_token_opens_a_gated_repository_and_stays_with_the_hub(hub, tmp_path):
    assert fetch("gated", tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN="right") == (0, SHA)
    asked = [headers.get("authorization") for _, path, headers in hub.log if "/resolve/" in path]
    assert set(asked) == {"Bearer right"}
    assert hub.files.log
    assert not any("authorization" in headers for _, _, headers in hub.files.log)


def test_a_proxy_is_used_and_what_it_brought_is_there_offline(hub, tmp_path):
    assert fetch("good", tmp_path, HF_ENDPOINT=PROXIED, HTTP_PROXY=hub.url) == (0, SHA)
    assert f"{PROXIED}/owner/good/resolve/main/tiny.pth" in hub.proxied
    assert fetch("good", tmp_path, HF_ENDPOINT=PROXIED, HF_HUB_OFFLINE="1") == (0, SHA)


@pytest.mark.parametrize(("variable", "value"), [("HF_HUB_ETAG_TIMEOUT", "0.5"), ("HF_HUB_DOWNLOAD_TIMEOUT", "x")])
def test_a_wrong_setting_is_named(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"^{variable}: expected a whole number of seconds, got '{value}'$"):
        models.find_weights("resnet18")


def test_a_disk_that_tells_nothing_is_not_full(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
    assert hub_module._free_bytes(Path("/")) == float("inf")


def test_a_socks_proxy_needs_a_package(monkeypatch):
    error = ImportError("Using SOCKS proxy, but the 'socksio' package is not installed.")
    assert str(hub_module._explained(error, "owner/repo/file")).endswith("is missing: pip install socksio")


def test_the_readme_has_the_table_as_it_is():
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Weights over a bad network")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if line[:2] == "| "
    ]
    assert [row[0] for row in rows[1:]] == list(FAULTS)
    for name, said, code, left in rows[1:]:
        fault = FAULTS[name]
        assert (code, left) == (str(fault.code), fault.left or "nothing"), name
        words = fault.says.format(hub="HUB", store="STORE", cache="CACHE")
        words = re.sub(r"owner/[\w-]+", "OWNER/REPO", words).replace("tiny.pth", "FILE")
        for part in re.findall(r"``(.+?)``|`([^`]+)`", said):
            assert "".join(part) in words, (name, part, words)
