"""`ckd-ray plan`: time, memory, storage and cost of every stage, before anything is paid (plan.md)."""
