"""Further scorers in the teacher's score: the encoder as it is, and BM25, weighted by what the labels say of them."""
