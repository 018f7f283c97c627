"""Mixins for frameworks that own the training loop. Nothing else in the package imports them."""
