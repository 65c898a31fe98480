"""Faster forms of what blocks compute; each has a torch reference that it equals, and that stands in for it."""
