"""Plans: the time and memory of a step, from its compiled program, before it runs."""
