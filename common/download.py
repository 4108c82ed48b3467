"""DSRL's own files, downloaded from Hugging Face."""

import os
from pathlib import Path

from common.args import UserError

REPO = "YYY-45/DSRL"  # a dataset repository
ANSWER = 4  # seconds; with no answer by then we are offline
BY_HAND = (
    f"put the file from the dataset repository {REPO} into $DSRL_DATASET_DIR, or make data with "
    "common/tools/collect.py, and give them with --data PATH"
)


class Offline(UserError):
    """The file is not here, and Hugging Face cannot be reached."""


def fetch(filename: str) -> Path:
    """DSRL's own file of that name, downloaded from Hugging Face where it is not here yet.

    It may lie in ``$DSRL_DATASET_DIR`` (default ``~/.dsrl/datasets``, as in dsrl) or in Hugging
    Face's cache. A download goes into the former if that variable is set, else into the cache.

    Raises:
        Offline: it must be downloaded, and Hugging Face cannot be reached.
        UserError: it cannot be downloaded or stored; the sentence says why.
    """
    folder = os.environ.get("DSRL_DATASET_DIR")
    own = Path(folder or "~/.dsrl/datasets").expanduser() / filename
    if own.is_file():
        return own
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub as hub  # takes a while

    hub.logging.set_verbosity(hub.logging.CRITICAL)
    file = {"repo_id": REPO, "filename": filename, "repo_type": "dataset"}
    try:
        cached = None if folder else hub.try_to_load_from_cache(**file)
        if not isinstance(cached, str):  # asked once: a download would ask for minutes
            hub.get_hf_file_metadata(hub.hf_hub_url(**file), timeout=ANSWER)
            cached = hub.hf_hub_download(**file, local_dir=own.parent if folder else None)
        return Path(cached)
    except Exception as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        if isinstance(error, hub.errors.HfHubHTTPError) or getattr(error, "errno", None):
            # the hub has answered, or a disk
            sentence = f"{filename}: no download from {REPO} ({reason}); {BY_HAND}"
            raise UserError(sentence) from None
        # of the network, a proxy's settings, a token
        endpoint = hub.constants.ENDPOINT
        sentence = f"{filename}: {endpoint} cannot be reached ({reason}); {BY_HAND}"
        raise Offline(sentence) from None
