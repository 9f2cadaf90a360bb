"""Data sets that are drawn here, to try things on."""
