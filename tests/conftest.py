"""What holds for all tests: one thread a process, as workers have, so that none waits for a busy core."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when it is first imported
