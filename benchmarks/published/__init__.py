"""Published behaviour, reproduced: each claim of a paper beside our figure."""
