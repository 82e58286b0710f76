"""Reading the labels of a run: why a query has them, what they look like, which passages they suggest."""
