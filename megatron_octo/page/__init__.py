"""What every HTML page of the project shares: markup, colours, drawing, style sheet."""
