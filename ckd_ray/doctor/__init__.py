"""Checks of a machine and a cluster before a run."""
