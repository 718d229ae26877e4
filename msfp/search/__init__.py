"""What layers read, and the search of their grids."""
