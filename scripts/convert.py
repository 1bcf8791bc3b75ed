"""Writes a model as a folder of Hugging Face: `attention-jax-convert`, run from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train.command_line import convert

if __name__ == "__main__":
    sys.exit(convert())
