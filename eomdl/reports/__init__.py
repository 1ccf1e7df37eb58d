"""Pages that say what was found, in plain words."""
