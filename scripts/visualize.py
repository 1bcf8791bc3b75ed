"""Draws masks: `attention-jax-visualize`, run from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train.command_line import visualize

if __name__ == "__main__":
    sys.exit(visualize())
