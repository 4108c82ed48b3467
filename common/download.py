"""DSRL's own files, downloaded from Hugging Face."""

import os
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from common.args import UserError

import h5py

REPO = "YYY-45/DSRL"  # a dataset repository
ANSWER = 4.0  # seconds; with no answer by then we are offline
BY_HAND = "put the file into $DSRL_DATASET_DIR by hand, or give another with --data PATH"


class Offline(UserError):
    """The file is not here, and Hugging Face cannot be reached."""


def fetch(filename: str) -> Path:
    """DSRL's own file of that name, downloaded from Hugging Face where it is not here yet.

    It may lie in ``$DSRL_DATASET_DIR`` (default ``~/.dsrl/datasets``, as in dsrl, whose downloader
    leaves half files behind: those do not count) or in Hugging Face's cache. A download goes into
    the former if that variable is set, else into the cache.

    Raises:
        Offline: it must be downloaded, and Hugging Face cannot be reached.
        UserError: it cannot be downloaded or stored; the sentence says why.
    """
    folder = os.environ.get("DSRL_DATASET_DIR")
    own = Path(folder or Path.home() / ".dsrl" / "datasets") / filename
    if own.is_file() and _opens(own):
        return own
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub as hub  # takes a while

    cached = hub.try_to_load_from_cache(REPO, filename, repo_type="dataset")
    if not folder and isinstance(cached, str):
        return Path(cached)
    hub.logging.set_verbosity(hub.logging.CRITICAL)
    try:
        size = _ask(hub, filename).size / 1e6
        print(f"downloading {filename} ({size:.1f} MB) from {hub.constants.ENDPOINT}", flush=True)
        return Path(hub.hf_hub_download(REPO, filename, repo_type="dataset", local_dir=folder))
    except OSError as error:  # of the hub's own errors too
        reason = error.strerror or str(error).partition("\n")[0]
        raise UserError(f"{filename}: no download from {REPO} ({reason}); {BY_HAND}") from None


def _opens(path: Path) -> bool:
    try:
        h5py.File(path, "r").close()
    except OSError as error:
        return error.errno is not None  # locked or not permitted: its reader will say so
    return True


def _ask(hub: Any, filename: str) -> Any:
    """What Hugging Face lists for a file; asked in a thread, since a look-up can hang for long."""
    url, answers = hub.hf_hub_url(REPO, filename, repo_type="dataset"), SimpleQueue()

    def ask() -> None:
        try:
            answers.put(hub.get_hf_file_metadata(url, timeout=ANSWER))
        except Exception as error:
            answers.put(error)

    Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=ANSWER)
        if isinstance(answer, Exception):
            raise answer
        return answer
    except hub.errors.HfHubHTTPError:
        raise
    except Exception as error:  # of the network, of the hub's own, or none within the time
        reason = str(error).partition("\n")[0] or f"no answer in {ANSWER:g} s"
        endpoint = hub.constants.ENDPOINT
        raise Offline(f"{filename}: {endpoint} cannot be reached ({reason}); {BY_HAND}") from None
