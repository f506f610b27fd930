"""Text as it comes: which files, how they are packed, where a document starts, what it says."""
