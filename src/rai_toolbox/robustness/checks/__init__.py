"""The checks of the evaluation itself; `trust.md` says what each means and what to do."""
