"""A run on the disk: its folder, checkpoints, metrics, and how it is read back."""
