"""DSRL's own files, downloaded from Hugging Face."""

import contextlib
import hashlib
import os
import re
import time
from concurrent import futures
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import h5py

from common.cli import UserError, progress_bar

REPO = "YYY-45/DSRL"  # a dataset repository
ANSWER = 4.0  # seconds; with no answer by then we are offline
PAUSES = (1.0, 2.0, 4.0)  # seconds between tries, where a server has an error
PATIENCE = 30.0  # seconds without a new byte, then a download is given up
HASH = re.compile("[0-9a-f]{64}|[0-9a-f]{40}")  # SHA-256; of small files, git's SHA-1
BY_HAND = "put the file into $DSRL_DATASET_DIR by hand, or give another with --data PATH"


class Offline(UserError):
    """The file is not here, and Hugging Face cannot be reached."""


def fetch(filename: str) -> Path:
    """DSRL's own file of that name, whole, downloaded from Hugging Face where it is not here yet.

    The first of these that serves:

    1. The file in ``$DSRL_DATASET_DIR`` (default ``~/.dsrl/datasets``, as in dsrl). Put there by
       hand it serves if h5py can open it: dsrl's own downloader leaves half files behind.
    2. Unless that variable is set, the file in Hugging Face's cache.
    3. A download: into ``$DSRL_DATASET_DIR`` if that is set, else in the place of a file that did
       not serve, else into the cache. It goes on where an interrupted one stopped.

    A download gets its name once its hash is the one that Hugging Face lists. Size and time are
    noted in ``.cache/huggingface`` beside it: where they have changed it is hashed again, and does
    not serve if it has become another file. A file that a download replaces is kept as ``.old``.
    What serves needs no network, and is not compared with what Hugging Face lists by now.

    Raises:
        Offline: it must be downloaded, and Hugging Face cannot be reached.
        UserError: it cannot be downloaded or stored; the sentence says why.
    """
    folder = os.environ.get("DSRL_DATASET_DIR")
    own = Path(folder or Path.home() / ".dsrl" / "datasets") / filename
    if _serves(own):
        return own
    hub = _hub()
    repo = hub.file_download.repo_folder_name(repo_id=REPO, repo_type="dataset")
    cache = Path(hub.constants.HF_HUB_CACHE) / repo
    place = own if folder or os.path.isfile(own) else cache / "snapshots"
    try:
        cached = hub.try_to_load_from_cache(REPO, filename, repo_type="dataset")
        if not folder and isinstance(cached, str) and _serves(Path(cached)):
            return Path(cached)
        listed = _ask(hub, filename)
        if place != own:
            place /= Path(listed.commit_hash, filename)
        _store(hub, place, listed)
        if place != own:  # lead the hub there
            (cache / "refs").mkdir(exist_ok=True)
            (cache / "refs" / "main").write_text(listed.commit_hash)
    except hub.errors.HfHubHTTPError as error:
        code, phrase = error.response.status_code, error.response.reason_phrase
        token = "check the token in HF_TOKEN or of `hf auth login`, "
        hint = {401: token, 403: token, 404: ""}.get(code, "try again later, ")
        raise UserError(
            f"{filename}: {hub.constants.ENDPOINT} answers {code} {phrase} for this file of the "
            f"dataset {REPO}; {hint}{BY_HAND}"
        ) from None
    except OSError as error:
        raise UserError(
            f"{place.parent} cannot take {filename} ({error.strerror or error}); it must be "
            "writable and have room for it, else name another folder in $DSRL_DATASET_DIR"
        ) from None
    return place


def _hub() -> ModuleType:
    """The package; imported here because that takes a while, and silenced."""
    # Else its first request would be for something that we have no use for.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import huggingface_hub.file_download
    except ValueError as error:
        raise UserError(f"one of the variables HF_... has a wrong value ({error})") from None
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
    return huggingface_hub


def _aside(path: Path, suffix: str) -> Path:
    return path.parent / ".cache" / "huggingface" / (path.name + suffix)


def _serves(path: Path) -> bool:
    """Whether there is such a file, whole as far as can be told here."""
    if not os.path.isfile(path):
        return False
    # In its cache the hub links to a file that has its hash as its name.
    known = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    with contextlib.suppress(OSError):
        known = _aside(path, ".verified").read_text().split(" ")[0]
    try:
        if HASH.fullmatch(known):
            return _is_whole(path, known)
        h5py.File(path, "r").close()  # put there by hand
    except OSError as error:
        # One with a number (not permitted, locked by its writer) says nothing about the content.
        return error.errno is not None
    return True


def _is_whole(path: Path, expected: str, place: Path | None = None) -> bool:
    """Whether a file, which is to become ``place``, has a hash; noted, so as to read it once."""
    stat, note = os.stat(path), _aside(place or path, ".verified")
    line = f"{expected} {stat.st_size} {stat.st_mtime_ns}"
    with contextlib.suppress(OSError):
        if note.read_text() == line:
            return True
    digest = hashlib.sha256() if len(expected) == 64 else hashlib.sha1(b"blob %d\0" % stat.st_size)
    if hash_file(path, digest) != expected:
        return False
    with contextlib.suppress(OSError):  # a read-only folder: then it is read every time
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(line)
    return True


def hash_file(path: Path, digest: Any) -> str:
    """The hash of a file's bytes, in hexadecimal, by one of hashlib's digests."""
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _ask(hub: ModuleType, filename: str) -> Any:
    """Commit, hash and size that Hugging Face lists for a file."""
    import httpx2

    url = hub.hf_hub_url(REPO, filename, repo_type="dataset")
    seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or ANSWER)

    def ask(answer: futures.Future) -> None:
        try:
            answer.set_result(hub.get_hf_file_metadata(url, timeout=2 * seconds))
        except Exception as error:
            answer.set_exception(error)

    for pause in (*PAUSES, None):
        answer: futures.Future = futures.Future()
        # In a thread, because nothing else ends the search for a host's address in time.
        Thread(target=ask, args=(answer,), daemon=True).start()
        try:
            listed = answer.result(seconds)
            if listed.commit_hash and listed.size and HASH.fullmatch(listed.etag or ""):
                return listed
            raise ConnectionError("what answers there is not Hugging Face")
        except hub.errors.HfHubHTTPError as error:
            if error.response.is_client_error or pause is None:
                raise
        except (futures.TimeoutError, httpx2.HTTPError, OSError) as error:
            late = f"no answer in {seconds:g} s, HF_HUB_ETAG_TIMEOUT=30 waits longer"
            reason = str(error).partition("\n")[0] or late
            endpoint = hub.constants.ENDPOINT
            raise Offline(
                f"{filename}: {endpoint} cannot be reached ({reason}); {BY_HAND}"
            ) from None
        time.sleep(pause)


def _store(hub: ModuleType, place: Path, listed: Any) -> None:
    """Download a file, and give it its name once it is whole."""
    part, endpoint = _aside(place, ".part"), hub.constants.ENDPOINT
    part.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {place} ({listed.size / 1e6:.1f} MB) from {endpoint}", flush=True)
    with hub.utils.WeakFileLock(_aside(place, ".lock")):  # another run may be doing the same
        if os.path.isfile(place) and _is_whole(place, listed.etag):
            return
        for _ in range(2):  # the start of it, from an earlier try, may have been altered since
            _receive(hub, place.name, part, listed)
            if _is_whole(part, listed.etag, place):
                break
            part.unlink()
        else:
            raise UserError(
                f"{place.name}: what {endpoint} sends has another hash than it lists, something on "
                f"the way alters it; try another network, or {BY_HAND}"
            )
        if os.path.isfile(place):
            os.replace(place, place.with_name(place.name + ".old"))
            print(f"note: {place} was damaged or altered; it is now {place.name}.old")
        os.replace(part, place)


def _receive(hub: ModuleType, filename: str, part: Path, listed: Any) -> None:
    """Append to ``part`` what is missing.

    ``hf_hub_download`` would begin from zero after an interruption, leave what it had behind, and
    delete the old file first.
    """
    import httpx2

    url = hub.hf_hub_url(REPO, filename, repo_type="dataset", revision=listed.commit_hash)
    headers = hub.utils.build_hf_headers() | {"Accept-Encoding": "identity"}
    shown = {"total": listed.size, "unit": "B", "unit_scale": True, "leave": False}
    timeout = hub.constants.HF_HUB_DOWNLOAD_TIMEOUT  # of each read
    deadline = time.monotonic() + PATIENCE
    with (
        open(part, "ab") as file,
        progress_bar(desc=filename, initial=file.tell(), **shown) as bar,
    ):
        while (have := file.tell()) < listed.size:
            reason = "it breaks off"
            try:
                headers["Range"] = f"bytes={have}-"
                with hub.get_session().stream(
                    "GET", url, headers=headers, timeout=timeout
                ) as answer:
                    hub.hf_raise_for_status(answer)
                    if answer.status_code != 206:  # all of it comes again
                        file.seek(0)
                        file.truncate()
                    for chunk in answer.iter_bytes():
                        file.write(chunk)
                        bar.update(file.tell() - bar.n)
            except httpx2.HTTPError as error:
                if getattr(error, "response", None) and error.response.is_client_error:
                    raise
                reason = str(error).partition("\n")[0] or type(error).__name__
            if file.tell() > have:
                deadline = time.monotonic() + PATIENCE
            elif time.monotonic() > deadline:
                raise UserError(
                    f"{filename}: the connection to {hub.constants.ENDPOINT} fails again and again "
                    f"({reason}); what has come is kept, try again later, or {BY_HAND}"
                )
            else:
                time.sleep(PAUSES[0])
