"""`--cluster`: where the job runs."""
