"""Which method helps, on real problems: every method of the catalogue against the plain sum and tuned fixed weights."""
