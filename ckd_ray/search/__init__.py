"""`ckd-ray search`: search a finished run, without Ray."""
