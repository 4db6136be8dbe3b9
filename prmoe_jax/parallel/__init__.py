"""The distribution of arrays over devices and processes."""
