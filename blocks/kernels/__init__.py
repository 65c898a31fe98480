"""Fused forms of what blocks compute, for the devices that gain from them; a block's own forward is the reference."""
