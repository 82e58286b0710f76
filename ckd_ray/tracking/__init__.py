"""Experiment trackers (TensorBoard, Weights & Biases, MLflow) that the driver tells of a run."""

from ckd_ray.tracking.trackers import TrackedRun, Tracking, forget_failures, tracked

__all__ = ["TrackedRun", "Tracking", "forget_failures", "tracked"]
