"""Surgery methods, one file per paper."""
