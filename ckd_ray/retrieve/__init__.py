"""Candidate generation and exact MaxSim over one range of shards or many."""
