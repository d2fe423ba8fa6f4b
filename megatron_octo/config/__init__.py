"""What a run is: typed, frozen configuration and the rules its fields must meet together."""
