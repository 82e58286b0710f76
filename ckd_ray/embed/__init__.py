"""Encoding a corpus: token-budget batches (encoder, without Ray) and the stream through an actor pool (Ray Data)."""
