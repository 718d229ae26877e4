"""What layers read, and the search of the grid that each gets."""
