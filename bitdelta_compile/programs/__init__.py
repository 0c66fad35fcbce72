"""Exported programs of one fine-tune or many, and the packages compiled from them."""
