"""A run on disk: its folder, its checkpoints, its metrics, and loading a trained model from it."""
