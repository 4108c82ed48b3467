"""What one runs beside the scripts."""

import os
from pathlib import Path

from common.args import UserError


def check_output(path: Path) -> None:
    """Raise a UserError before the work is done, where ``--output`` cannot be written."""
    if os.path.isdir(path) or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"--output {path}: must be a file, in a folder that can be written to")
