"""The stage graph: what is made of what, what is there already, and the run directory."""
