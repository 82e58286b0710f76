"""The package in Python: `ckd_ray.train`, `ckd_ray.open` and the `Run` that both return."""
