"""`ckd-ray search`: ask a finished run, without Ray."""
