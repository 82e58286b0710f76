"""Training: objectives, batches, the step, the Ray Train worker and its driver."""
