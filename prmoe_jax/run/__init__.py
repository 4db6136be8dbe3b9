"""A run's folder: what is written there while it trains, and how a run is restored from it."""
