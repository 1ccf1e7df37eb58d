"""Symmetries of the loss, their charges, and how discreteness breaks the conservation laws."""
