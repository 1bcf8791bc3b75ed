"""Measures associative recall of mixers: `attention-jax-recall`, run from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train.command_line import recall

if __name__ == "__main__":
    sys.exit(recall())
