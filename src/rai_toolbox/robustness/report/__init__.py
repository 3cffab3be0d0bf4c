"""`Evaluation` and `Comparison`, and the files that show them."""
