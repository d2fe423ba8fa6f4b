"""`octo`: parse, call one function, print. No logic."""
