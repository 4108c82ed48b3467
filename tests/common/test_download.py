"""Downloads from a hub on this machine: the few ways in which a user meets them."""

import hashlib
import http.server
import sys
import threading
import time

from common.args import UserError
from common.download import REPO, Offline, fetch

import h5py
import numpy as np
import pytest

NAME = "SafetyBallRun-v0-80-940.hdf5"
COMMIT = "0123456789" * 4
PATH = f"/datasets/{REPO}/resolve"


class Hub(http.server.ThreadingHTTPServer):
    """Lists and sends one file; ``fault`` says what goes wrong."""

    daemon_threads = True

    def __init__(self, content: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.fault, self.seen = content, "", []
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(b"")

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        self.answer(self.server.content[start:], start)

    def answer(self, body: bytes, start: int = 0):
        hub = self.server
        hub.seen.append((self.command, self.path.rpartition("/")[2]))
        if hub.fault == "silent":
            hub.closing.wait(60)
        if hub.fault == "none" or not self.path.startswith(PATH):
            return self.send(404, {"X-Error-Code": "EntryNotFound", "Content-Length": 0})
        if hub.fault == "down" and self.command == "GET":
            return self.send(403, {"Content-Length": 0})
        sha256 = hashlib.sha256(hub.content).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256}"', "Content-Length": len(body)}
        if self.command == "HEAD":
            headers["Content-Length"] = len(hub.content)
        self.send(206 if start else 200, headers)
        if hub.fault == "breaks off" and body:
            hub.fault, body, self.close_connection = "", body[: len(body) // 2], True
        self.wfile.write(body)

    def send(self, status: int, headers: dict):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with an HDF5 file, and the home of a user who has nothing yet."""
    with h5py.File(tmp_path / "original", "w") as file:
        file["rewards"] = np.random.default_rng(0).normal(size=30_000)
    hub = Hub((tmp_path / "original").read_bytes())
    monkeypatch.delenv("DSRL_DATASET_DIR")
    for name in [x for x in sys.modules if x.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)  # it reads its variables when it is imported
    variables = {"HF_HUB_OFFLINE": 0, "HF_HOME": tmp_path / "hf", "NO_PROXY": "127.0.0.1"}
    variables |= {"HOME": tmp_path, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    yield hub
    hub.closing.set()
    hub.shutdown()
    hub.server_close()


def test_a_download_lands_whole_in_the_cache_and_is_used_from_there(hub, tmp_path):
    hub.fault = "breaks off"
    place = fetch(NAME)
    assert place.read_bytes() == hub.content and place.is_relative_to(tmp_path / "hf")
    assert [method for method, _ in hub.seen].count("GET") == 2, "it went on after the break"
    hub.seen.clear()
    assert fetch(NAME) == place and hub.seen == []
    assert not (tmp_path / ".dsrl").exists()


@pytest.mark.parametrize("named", [True, False])
def test_a_file_that_is_here_is_used_else_it_is_downloaded(named, hub, tmp_path, monkeypatch):
    folder = tmp_path / ("mine" if named else ".dsrl/datasets")
    if named:
        monkeypatch.setenv("DSRL_DATASET_DIR", "~/mine")
    folder.mkdir(parents=True)
    (folder / NAME).write_bytes(hub.content)
    assert fetch(NAME) == folder / NAME and hub.seen == []
    (folder / NAME).unlink()
    hub.fault = "down"
    with pytest.raises(UserError, match=NAME):
        fetch(NAME)
    hub.fault = ""
    place = fetch(NAME)
    assert place.read_bytes() == hub.content
    assert (place == folder / NAME) == named, "it goes where the variable says, else to the cache"


def test_a_file_that_the_hub_does_not_have(hub):
    hub.fault = "none"
    with pytest.raises(UserError, match=rf"{NAME}: .*404 .*--data PATH") as error:
        fetch(NAME)
    assert not isinstance(error.value, Offline) and "\n" not in str(error.value)


@pytest.mark.parametrize("reason", ["nobody listens", "it never answers", "offline"])
def test_offline_is_noticed_within_5_seconds(reason, hub, monkeypatch):
    if reason == "nobody listens":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    elif reason == "it never answers":
        hub.fault = "silent"
    else:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    started = time.monotonic()
    with pytest.raises(Offline, match=f"{NAME}: .*cannot be reached .*--data PATH") as error:
        fetch(NAME)
    assert time.monotonic() - started < 5 and "\n" not in str(error.value)


SETTINGS = ("ALL_PROXY=socks5://127.0.0.1:9", "HTTP_PROXY=http://127.0.0.1:abc", "HF_TOKEN=“x”")


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_cannot_be_used_is_as_if_offline(setting, hub, monkeypatch):
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv(*setting.split("="))
    with pytest.raises(Offline, match=f"{NAME}: .*cannot be reached .*collect.py.*--data PATH"):
        fetch(NAME)
