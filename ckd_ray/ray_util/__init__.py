"""What several stages need of Ray: the session, the pool of actors, parts of a stage, the watch over a lost Ray."""
