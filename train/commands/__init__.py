"""Command lines: each module is one program, `python scripts/NAME.py` or `attention-jax-NAME`."""
