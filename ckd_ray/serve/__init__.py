"""`ckd-ray search RUN --serve`: a run's student behind HTTP, by Ray Serve."""
