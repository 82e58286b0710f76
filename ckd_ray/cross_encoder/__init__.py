"""Labels from another teacher: scores of (query, candidate) pairs, from a file or from a sequence classifier.

`scores` keeps them and reads them in training, `score_file` takes them from a file, `classifier` computes them (pure
torch), `stream` does so on a cluster.
"""
