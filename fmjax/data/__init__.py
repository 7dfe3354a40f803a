"""Data: toy distributions of the plane, and real images."""
