"""What a machine or pod can do, found out before money is spent: `prmoe check`."""
