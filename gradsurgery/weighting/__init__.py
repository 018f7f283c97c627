"""Weighting methods, one file per paper."""
