"""`ckd-ray tune`: settings of the labels and of the distillation, found by trials on dev instead of guessed."""
