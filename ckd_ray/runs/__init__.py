"""The directory of a run: where its folders are, which are finished, who holds it."""
