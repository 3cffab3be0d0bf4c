"""What an evaluation and a comparison are, and the files that show them."""
