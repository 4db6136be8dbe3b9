"""What a compiler says about a program before it runs."""
