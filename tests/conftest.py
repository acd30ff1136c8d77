"""Present so that pytest puts this folder on the path: `numpy_twin` is imported from tests in folders below."""

import os

# Threads of XLA's CPU client, which reads this once: each warpgroup of an interpreted kernel blocks one.
os.environ.setdefault("NPROC", "16")
