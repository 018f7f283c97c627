"""Everything that needs a GPU, in one run of some minutes."""
