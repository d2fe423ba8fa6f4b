"""A finished data directory as one HTML page."""
