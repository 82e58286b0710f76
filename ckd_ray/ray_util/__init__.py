"""Ray for several stages: the session, the actor pool, the parts of a stage, the watch for a lost Ray."""
