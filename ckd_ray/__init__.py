"""ckd-ray: distil collective relevance labels into a late-interaction (ColBERT) retriever, on Ray."""

__version__ = "0.1.0"
