"""Downloads from a hub on this machine, which can be told to fail in every way a network can.

The downloading program is one of its own, since the package reads its variables when imported.
"""

import contextlib
import fcntl
import hashlib
import http.server
import os
import pty
import random
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
from itertools import chain, repeat
from pathlib import Path

import h5py
import numpy as np
import pytest

from common.download import REPO

ROOT = Path(__file__).resolve().parents[1]
NAME = "SafetyBallRun-v0-80-940.hdf5"
COMMIT = "0123456789" * 4
FOLDER = f"/datasets/{REPO}/resolve"

PROGRAM = """
import os, signal, socket, sys, time, types
# Slow to import, and of no use here.
sys.modules["torch"] = sys.modules["tyro"] = types.SimpleNamespace(device=None)
from common import cli, download
real = download.ANSWER
# A busy machine is patient, but does not pause for long.
download.ANSWER, download.PATIENCE, download.PAUSES = 30.0, 20.0, (0.1, 0.2)
{first}
start = time.monotonic()
def main():
    try:
        print("got", download.fetch(sys.argv[1]))
    finally:
        print("after", time.monotonic() - start, type(sys.exc_info()[1]).__name__)
cli.run_main(main)
"""


class Hub(http.server.ThreadingHTTPServer):
    """The hub, and under another name (localhost) the store to which it sends for large files."""

    daemon_threads = True

    def __init__(self, content: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.hash = hashlib.sha256(content).hexdigest()
        self.faults = {"HEAD": iter(()), "GET": iter(())}  # one for each request; then none
        self.pause = 0.0  # seconds before each 16 KiB
        self.seen = []  # method, path and headers of each request
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that was killed is no error of the hub's."""

    def ranges(self):
        """Where the downloads began."""
        begun = [headers["Range"] for method, path, headers in self.seen if path == f"/{NAME}"]
        return [int(x.removeprefix("bytes=").removesuffix("-")) for x in begun]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.resolve()

    def do_GET(self):
        if self.path == f"/{NAME}":
            self.send_file()
        else:
            self.resolve()

    def log_message(self, *args):
        pass

    def answer(self, status, headers=(), body=b""):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **dict(headers)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(body)

    def resolve(self):
        hub = self.server
        hub.seen.append((self.command, self.path, dict(self.headers)))
        fault = next(hub.faults["HEAD"], None) if self.command == "HEAD" else None
        if fault == "silent":
            hub.closing.wait(600)
        elif fault == "login page":
            self.answer(200, {"Content-Type": "text/html"})
        elif isinstance(fault, tuple):
            self.answer(fault[0], {"X-Error-Code": fault[1], "X-Error-Message": "no"})
        elif isinstance(fault, int):
            self.answer(fault, {"Retry-After": "3600"})
        elif self.path not in (f"{FOLDER}/main/{NAME}", f"{FOLDER}/{COMMIT}/{NAME}"):
            self.answer(404, {"X-Error-Code": "EntryNotFound"})
        else:
            listed = {"X-Repo-Commit": COMMIT, "X-Xet-Hash": "f" * 64, "ETag": '"something"'}
            listed |= {"X-Linked-Size": len(hub.content), "X-Linked-Etag": f'"{hub.hash}"'}
            # The token is for the hub, not for the store.
            store = f"http://localhost:{hub.server_port}/{NAME}"
            warning = {"X-HF-Warning": "token; You are not logged in"}
            self.answer(302, listed | warning | {"Location": store})

    def send_file(self):
        hub, fault = self.server, next(self.server.faults["GET"], None)
        hub.seen.append((self.command, self.path, dict(self.headers)))
        if isinstance(fault, int):
            self.answer(fault)
            return
        kind, number = fault or ("", None)
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if kind != "no range" else 0
        body = bytearray(hub.content[start:])
        if kind == "altered":
            body[number] ^= 1
        self.send_response(206 if start else 200)
        if kind != "short":
            self.send_header("Content-Length", str(len(body)))
        else:  # as long as it lasts
            self.send_header("Connection", "close")
        self.end_headers()
        if kind != "altered":
            body = body[:number]
        for i in range(0, len(body), 1 << 14):
            time.sleep(hub.pause)
            self.wfile.write(body[i : i + (1 << 14)])
        if kind == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            os.close(self.connection.detach())
        if kind == "stalled":
            hub.closing.wait(600)
        self.close_connection = len(body) < len(hub.content) - start or kind == "short"


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """An HDF5 file of 2.4 MB."""
    path = tmp_path_factory.mktemp("content") / NAME
    with h5py.File(path, "w") as file:
        file["rewards"] = np.random.default_rng(0).normal(size=300_000)
    return path.read_bytes()


@pytest.fixture
def hub(content):
    hub = Hub(content)
    yield hub
    hub.close()


class Machine:
    """A user's home, and the program run in it."""

    def __init__(self, home: Path, hub: Hub):
        self.home, self.hub = home, hub
        self.dsrl = home / ".dsrl" / "datasets"
        self.repo = home / "hf" / "hub" / f"datasets--{REPO.replace('/', '--')}"
        self.cached = self.repo / "snapshots" / COMMIT / NAME
        self.variables = {
            "HOME": str(home),
            "HF_HOME": str(home / "hf"),
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_TOKEN": "secret",
        }

    def start(self, program=None, prefix=(), first="", stderr=subprocess.PIPE, **variables):
        other = re.compile("(HF|DSRL)_|.*_proxy$", re.IGNORECASE)
        kept = {key: value for key, value in os.environ.items() if not other.match(key)}
        return subprocess.Popen(
            [*prefix, sys.executable, "-c", program or PROGRAM.format(first=first), NAME],
            cwd=ROOT,
            env=kept | self.variables | {key: str(value) for key, value in variables.items()},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    def run(self, *args, **kwargs):
        """Run to the end: what it got, all it said, and its error's sentence."""
        done = self.start(*args, **kwargs)
        out, err = done.communicate(timeout=120)
        error = ""
        if done.returncode:
            assert done.returncode == 2, err
            error = err.splitlines()[-1]
            assert error.startswith("error: ")
            assert any(way in error for way in ("--data PATH", "$DSRL_DATASET_DIR", "HF_..."))
        # Beside that one line there is the progress bar, nothing else.
        bar = re.split(r"[\r\n]\s*", err.removesuffix(error + "\n").strip())
        bar = [line for line in bar if line]
        assert all(line.startswith(f"{NAME}: ") for line in bar), err
        *said, last = out.splitlines()
        got = Path(said.pop().removeprefix("got ")) if not error else None
        self.bar, self.seconds, self.error_type = bar, float(last.split()[1]), last.split()[2]
        return got, "\n".join(said), error

    def gets(self, place: Path, first="", **variables):
        got, said, error = self.run(first=first, **variables)
        assert not error and got == place and place.read_bytes() == self.hub.content
        return said


@pytest.fixture
def machine(tmp_path, hub):
    return Machine(tmp_path, hub)


NO_NETWORK = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nobody listens on that port


def test_a_download_lies_in_the_cache_and_is_used_from_there(machine, hub):
    said = machine.gets(machine.cached)
    assert said.startswith(f"downloading {machine.cached} (2.4 MB) from http://127.0.0.1:")
    assert machine.bar[0].startswith(f"{NAME}:   0%|")
    assert machine.gets(machine.cached, HF_HUB_OFFLINE=1) == ""
    assert [(method, path) for method, path, _ in hub.seen] == [
        ("HEAD", f"{FOLDER}/main/{NAME}"),
        ("GET", f"{FOLDER}/{COMMIT}/{NAME}"),
        ("GET", f"/{NAME}"),
    ]
    # The token is for the hub alone, and a compressed file could not be gone on with.
    sent = [headers.get("authorization") for _, _, headers in hub.seen]
    assert sent == ["Bearer secret", "Bearer secret", None]
    assert hub.seen[-1][2]["Accept-Encoding"] == "identity"
    # The hub finds it as well.
    program = f"""if True:
        import huggingface_hub, sys
        print(huggingface_hub.hf_hub_download("{REPO}", sys.argv[1], repo_type="dataset"))
        print(huggingface_hub.scan_cache_dir().warnings)
    """
    out, err = machine.start(program, HF_HUB_OFFLINE=1).communicate(timeout=120)
    assert out.splitlines() == [str(machine.cached), "[]"], err
    assert not machine.dsrl.exists()
    folder = machine.home / "folder"  # one that is named is where the file is wanted
    machine.gets(folder / NAME, DSRL_DATASET_DIR=folder)


def test_what_the_hub_downloaded_is_found_here_without_network(machine, hub):
    blob = machine.repo / "blobs" / hub.hash
    for path in (blob, machine.cached, machine.repo / "refs" / "main"):
        path.parent.mkdir(parents=True)
    blob.write_bytes(hub.content[:-1] + b"?")
    machine.cached.symlink_to(f"../../blobs/{hub.hash}")
    (machine.repo / "refs" / "main").write_text(COMMIT)
    assert "cannot be reached" in machine.run(**NO_NETWORK)[2]
    blob.write_bytes(hub.content)
    machine.gets(machine.cached, **NO_NETWORK)
    (note,) = machine.cached.parent.rglob(".cache/huggingface/*")  # so as to read it once
    assert note.name == f"{NAME}.verified"
    blob.write_bytes(hub.content[:-1])
    machine.gets(machine.cached)


def test_a_small_file_is_listed_under_gits_hash(machine, hub):
    hub.hash = hashlib.sha1(b"blob %d\0" % len(hub.content) + hub.content).hexdigest()
    machine.gets(machine.cached)


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("named", [True, False])
def test_a_file_put_by_hand_is_used_as_it_is(machine, tmp_path, named):
    with h5py.File(tmp_path / "mine.hdf5", "w") as file:
        file["rewards"] = np.ones(3)
    folder = tmp_path / "folder" if named else machine.dsrl
    folder.mkdir(parents=True)
    if named:
        shutil.copy(tmp_path / "mine.hdf5", folder / NAME)
    else:
        (folder / NAME).symlink_to(tmp_path / "mine.hdf5")
    variables = NO_NETWORK | ({"DSRL_DATASET_DIR": folder} if named else {})
    first = """sys.modules["huggingface_hub"] = None  # slow to import, and not needed"""
    assert machine.run(first=first, **variables) == (folder / NAME, "", "")
    assert [path.name for path in folder.iterdir()] == [NAME]


@pytest.mark.parametrize(("named", "length"), [(True, 1000), (True, 0), (False, -1)])
def test_half_a_file_is_replaced_where_it_is(machine, hub, tmp_path, named, length):
    folder = tmp_path / "folder" if named else machine.dsrl
    own = put(folder / NAME, hub.content[:length])
    variables = {"DSRL_DATASET_DIR": folder} if named else {}
    if length == 1000:  # nothing happens to it before its replacement is whole
        _, said, error = machine.run(**variables | NO_NETWORK)
        assert error and "note" not in said and own.read_bytes() == hub.content[:length]
    said = machine.gets(own, **variables)
    assert said.splitlines()[1].startswith(f"note: {own} was damaged")
    assert said.count("\n") == 1
    assert own.with_name(f"{NAME}.old").read_bytes() == hub.content[:length]
    if length == 1000:
        assert machine.gets(own, **variables | NO_NETWORK) == ""


def test_a_file_locked_by_its_writer_is_not_replaced(machine, hub):
    own = put(machine.dsrl / NAME, hub.content)
    with h5py.File(own, "a"):
        assert machine.run(**NO_NETWORK)[0] == own


@pytest.mark.parametrize("named", [True, False])
def test_a_download_that_was_altered_is_replaced(machine, hub, tmp_path, named):
    folder = tmp_path / "folder"
    place = folder / NAME if named else machine.cached
    variables = {"DSRL_DATASET_DIR": folder} if named else {}
    machine.gets(place, **variables)
    os.utime(place, (0, 0))  # as a copy might be: it is read again, and serves
    machine.gets(place, **variables | NO_NETWORK)
    for changed in (hub.content[:-1] + b"?", hub.content[:-1])[: 1 + named]:
        place.write_bytes(changed)
        said = machine.gets(place, **variables)
        assert said.splitlines()[1:] == [
            f"note: {place} was damaged or altered; it is now {NAME}.old"
        ]
        assert place.with_name(f"{NAME}.old").read_bytes() == changed


def test_a_download_is_read_once(machine, hub):
    machine.gets(machine.cached)
    times = machine.cached.stat()
    machine.cached.write_bytes(b"?" + hub.content[1:])
    os.utime(machine.cached, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert machine.run(**NO_NETWORK)[0] == machine.cached  # not hashed: it looks as it did


SHORT = "download.PATIENCE = 1.0"
MENDED = {
    "reset": [("reset", 500_000)] * 3,
    "broken off": [("broken", 300_000)] * 4,
    "ends early": [("short", 300_000)] * 4,
    "errors of the store": [503, 500],
    "no more bytes": [("stalled", 300_000)],
    "no ranges": [("broken", 300_000), ("no range", None)],
    "altered once": [("altered", 70_000)],
    "altered after a break": [("broken", 300_000), ("altered", 70_000)],
}


@pytest.mark.parametrize("name", MENDED)
def test_a_fault_that_passes_is_mended(name, machine, hub):
    hub.faults["GET"] = iter(MENDED[name])
    machine.gets(machine.cached, HF_HUB_DOWNLOAD_TIMEOUT=1)
    if name in ("reset", "broken off", "ends early"):
        assert hub.ranges() == sorted(set(hub.ranges())), "it goes on where it broke off"
    if name == "no ranges":
        assert hub.ranges() == [0, 300_000], "what came before is dropped at once"
    assert not list(machine.home.rglob("*.part"))


def test_errors_of_the_hub_that_pass(machine, hub):
    hub.faults["HEAD"] = iter([503, 502])
    machine.gets(machine.cached)


def test_patience_begins_anew_with_each_byte(machine, hub):
    hub.pause = 0.02  # slower than the program is patient
    hub.faults["GET"] = iter([("broken", 1_200_000), ("reset", 0)])
    machine.gets(machine.cached, first=SHORT)


def test_a_download_given_up_goes_on_the_next_time(machine, hub):
    hub.faults["GET"] = chain([("broken", 300_000)], repeat(("reset", 0)))
    assert "fails again and again" in machine.run(first=SHORT)[2]
    hub.faults["GET"] = iter(())
    machine.gets(machine.cached)
    assert hub.ranges()[-1] == 300_000


REFUSED = {
    "no such file": ("HEAD", [(404, "EntryNotFound")], "answers 404 Not Found"),
    "no such dataset": ("HEAD", [(401, "RepoNotFound")], "check the token in HF_TOKEN"),
    "not for everybody": ("HEAD", [(403, "GatedRepo")], "check the token in HF_TOKEN"),
    "the hub is down": ("HEAD", repeat(503), "answers 503 Service Unavailable"),
    "the store is down": ("GET", repeat(503), "fails again and again (Server error '503"),
    "the store refuses": ("GET", [403], "answers 403 Forbidden"),
    "it always breaks": ("GET", repeat(("reset", 0)), "fails again and again ("),
    "it is always short": ("GET", repeat(("short", 0)), "fails again and again (it breaks off)"),
    "it is always altered": ("GET", repeat(("altered", 70_000)), "has another hash than it lists"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_fault_that_stays_becomes_one_sentence(name, machine, hub):
    method, faults, sentence = REFUSED[name]
    hub.faults[method] = iter(faults)
    _, _, error = machine.run(first=SHORT, DSRL_DATASET_DIR=machine.home / "folder")
    assert sentence in error and NAME in error and machine.error_type == "UserError"
    assert ("try again later" in error) == ("is down" in name or "fails again" in sentence)
    assert machine.seconds < 30 and not (machine.home / "folder" / NAME).exists()


LOST = "socket.getaddrinfo = lambda *args, **kwargs: time.sleep(60)"
ONE = {"HF_HUB_ETAG_TIMEOUT": 1}
UNREACHABLE = {
    "nobody listens": (NO_NETWORK, [], "", "Connection refused"),
    "it never answers": ({}, ["silent"], "", "no answer in 4 s"),
    "no address is found": (
        ONE | {"HF_ENDPOINT": "http://lost"},
        [],
        LOST,
        "no answer in 1 s, HF_H",
    ),
    "no scheme": ({"HF_ENDPOINT": "nowhere.invalid"}, [], "", "protocol"),
    "a login page": ({}, ["login page"], "", "is not Hugging Face"),
    "switched off": ({"HF_HUB_OFFLINE": 1}, [], "", "HF_HUB_OFFLINE"),
}


@pytest.mark.parametrize("name", UNREACHABLE)
def test_offline_is_noticed_within_5_seconds(name, machine, hub):
    variables, faults, first, reason = UNREACHABLE[name]
    hub.faults["HEAD"] = iter(faults)
    started = time.monotonic()
    first = f"download._hub(); download.ANSWER = real; {first}"  # not to measure the import
    _, said, error = machine.run(first=first, **variables)
    assert machine.error_type == "Offline" and machine.seconds < 5
    assert time.monotonic() - started < 45, "the program ends as well"
    assert reason in error and "cannot be reached" in error and said == ""


def test_a_wrong_variable(machine):
    assert "HF_... has a wrong value" in machine.run(HF_ENDPOINT="http://host:port")[2]


def test_a_folder_that_cannot_be_written(machine, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for variable in ("DSRL_DATASET_DIR", "HF_HOME"):
        error = machine.run(**{variable: tmp_path / "file"})[2]
        assert f"{tmp_path / 'file'}" in error and "cannot take" in error


def test_a_full_disk(machine, hub, tmp_path):
    """A file system of 1 MB, in a namespace of the program's own."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = f"mount -t tmpfs -o size=1m none {folder}"
    prefix = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*prefix, mount], stderr=-3).returncode:
        pytest.skip("no file system can be mounted here")
    prefix += [f'{mount}; "$@"; code=$?; ls {folder} >&2; exit $code', "sh"]
    done = machine.start(prefix=prefix, DSRL_DATASET_DIR=folder)
    out, err = done.communicate(timeout=120)
    assert done.returncode == 2 and "UserError" in out
    *_, error = err.splitlines()  # and not the file: the folder's listing is empty
    assert f"{folder} cannot take {NAME} (No space left on device)" in error


def test_a_file_that_may_not_grow(machine, hub):
    """As on a disk that fills up while the file is written."""
    folder = machine.home / "folder"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))"
    error = machine.run(first=limit, DSRL_DATASET_DIR=folder)[2]
    assert f"{folder} cannot take {NAME} (File too large)" in error
    assert not (folder / NAME).exists()
    machine.gets(folder / NAME, DSRL_DATASET_DIR=folder)
    assert hub.ranges()[1] > 900_000


def test_two_at_once_download_it_once(machine, hub):
    hub.pause = 0.005
    both = [machine.start(DSRL_DATASET_DIR=machine.home / "folder") for _ in range(2)]
    for one in both:
        out, err = one.communicate(timeout=120)
        assert one.returncode == 0 and f"got {machine.home / 'folder' / NAME}" in out, err
    assert hub.ranges() == [0]
    assert (machine.home / "folder" / NAME).read_bytes() == hub.content


def test_progress_is_shown_on_a_terminal(machine, hub):
    hub.pause = 0.005
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # lines and columns
    one = machine.start(stderr=its)
    os.close(its)
    shown = b""
    with contextlib.suppress(OSError):  # the end
        while more := os.read(ours, 1000):
            shown += more
    os.close(ours)
    one.communicate(timeout=120)
    percents = [int(x) for x in re.findall(rb"(\d+)%", shown)]
    assert percents == sorted(percents) and len(set(percents)) > 3


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_interrupted_download_goes_on(machine, hub):
    hub.pause = 0.02
    part = machine.cached.parent / ".cache" / "huggingface" / f"{NAME}.part"
    # A test run in the background ignores the key, and so would a program that it starts.
    one = machine.start(first="signal.signal(signal.SIGINT, signal.default_int_handler)")
    wait_for(lambda: part.exists() and part.stat().st_size > 500_000)
    one.send_signal(signal.SIGINT)
    _, err = one.communicate(timeout=120)
    assert one.returncode == 130 and err.endswith("error: interrupted\n") and "Trace" not in err
    hub.pause = 0
    machine.gets(machine.cached)
    assert hub.ranges()[1] > 400_000


def test_killed_ten_times_at_random(machine, hub):
    folder = machine.home / "folder"
    before = hub.content[:5000]
    put(folder / NAME, before)
    chance, hub.pause = random.Random(0), 0.05
    for i in range(10):
        one = machine.start(DSRL_DATASET_DIR=folder)
        if i % 2:  # kill while it downloads, else while it gets there
            assert one.stdout.readline().startswith("downloading")
        time.sleep(chance.uniform(0, 0.5))
        one.kill()
        one.communicate()
        assert (folder / NAME).read_bytes() in (before, hub.content)
    hub.pause = 0
    machine.gets(folder / NAME, DSRL_DATASET_DIR=folder)
    assert hub.ranges() == sorted(hub.ranges()) and hub.ranges()[-1] > 0


KILL = "lambda *args: os.kill(os.getpid(), signal.SIGKILL)"
KILLED = {
    "before the old file is moved": f"os.replace = {KILL}",
    "between the two": f"replace = os.replace; os.replace = lambda *a: (replace(*a), ({KILL})())",
    "before the hash is known": f"download._is_whole = {KILL}",
}


@pytest.mark.parametrize("name", KILLED)
def test_killed_at_its_last_steps(name, machine, hub):
    folder = machine.home / "folder"
    put(folder / NAME, hub.content[:5000])
    one = machine.start(first=KILLED[name], DSRL_DATASET_DIR=folder)
    one.communicate(timeout=120)
    assert one.returncode == -signal.SIGKILL
    machine.gets(folder / NAME, DSRL_DATASET_DIR=folder)
    assert hub.ranges() == [0], "nothing is asked for again"
