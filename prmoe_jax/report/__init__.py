"""Reports about runs: figures, and a page that needs no network."""
