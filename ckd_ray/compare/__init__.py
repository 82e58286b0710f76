"""`ckd-ray compare`: the objectives and BM25 on one collection, under one budget and several seeds."""
