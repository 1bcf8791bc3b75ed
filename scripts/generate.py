"""Continues a prompt with a trained model: `attention-jax-generate`, run from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train.command_line import generate

if __name__ == "__main__":
    sys.exit(generate())
