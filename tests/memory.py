"""Memory of this process."""

import resource
import sys
from pathlib import Path


def resident_bytes():
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
