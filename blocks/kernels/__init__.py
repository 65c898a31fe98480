"""Fused and faster forms of what blocks compute, each with a torch reference that it equals and that stands in for it."""
