"""Checks of one member before anything is loaded: its hub entry, its folder, its tokenizer."""
