"""`evaluate`, in `_evaluate.py`: prepare, run every stage, assemble the result."""
