"""The truth: NumPy float64, written from the papers, sharing no code with the library."""
