"""The label stage, the files of labels, and tools that read them."""
