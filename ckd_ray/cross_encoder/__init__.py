"""Another teacher: scores of (query, candidate) pairs, from a file or from a sequence classifier.

`scores` has their form on disk, `score_file` imports them from a file, `classifier` computes them (pure torch), and
`stream` computes them on a cluster.
"""
