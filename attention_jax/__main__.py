"""`python -m attention_jax` prints the catalogue."""

import os
import sys

from attention_jax.catalogue import table

try:
    print(table(), flush=True)
except BrokenPipeError:  # `| head` has read enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
