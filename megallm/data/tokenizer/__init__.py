"""Text to token ids and back: one small interface, one file for each library."""
