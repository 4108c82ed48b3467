"""What every method must share to be compared fairly: data, feedback, evaluation, results.

A script imports from here before it imports torch, which reads this once: how long its threads
spin while they wait for each other. The default is thirty times as long, which costs a multiple of
the time beside other programs.
"""

import ctypes
import os
import tempfile

if os.path.expanduser("~") == "~":  # a user without a home, as in some containers
    os.environ["HOME"] = tempfile.gettempdir()
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Left alone, glibc gives large tensors back and fetches them anew: twice the time of a long step.
libc = ctypes.CDLL(None)
if hasattr(libc, "mallopt"):
    libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD, bytes
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes
