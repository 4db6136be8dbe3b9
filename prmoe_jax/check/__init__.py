"""`prmoe check`: finds out what a machine or pod can do before money is spent on it."""
