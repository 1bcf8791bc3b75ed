"""Times attention beside other systems: `attention-jax-benchmark`, run from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train.command_line import benchmark

if __name__ == "__main__":
    sys.exit(benchmark())
