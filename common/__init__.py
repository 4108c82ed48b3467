"""What every method must share to be compared fairly: data, feedback, evaluation, results.

A script imports from here before it imports torch, so that what follows is set in time.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
