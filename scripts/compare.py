"""Compares mechanisms as the same small language model: `attention-jax-compare`, run from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train.command_line import compare

if __name__ == "__main__":
    sys.exit(compare())
