"""Feature maps: the principal components of spatial features as colors."""
