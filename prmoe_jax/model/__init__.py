"""The decoder-only transformer: layers, sizes, backends, loss."""
