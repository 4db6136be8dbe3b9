"""A run's folder: the files that training writes, and how a run is restored from them."""
