"""Batches: from text, from pairs of texts, or from a synthetic task."""
