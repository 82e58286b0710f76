"""Jobs on a cluster: the launcher, submitting, following, the tunnel."""
