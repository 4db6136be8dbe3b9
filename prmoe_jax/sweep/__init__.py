"""Many runs from one Python file."""
