"""Runs, measures (ir-measures), significance, and the comparison of teacher and student."""
