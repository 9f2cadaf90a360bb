"""A study of large batches that anyone can repeat (docs/evidence.md)."""
