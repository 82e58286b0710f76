"""`ckd-ray compare`: the objectives and the run's baselines on one collection, under one budget and several seeds."""
