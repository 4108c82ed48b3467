"""What every method must share to be compared fairly: data, feedback, evaluation, results.

A script imports from here before it imports torch, which reads this once: how long its threads
spin while they wait for each other. The default is thirty times as long, and beside other programs
training then takes four times as long as on an idle machine, in place of two and a half.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
