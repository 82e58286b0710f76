"""Looking into a finished run: why a query has its labels, and what the labels say that no annotator has. No Ray."""
