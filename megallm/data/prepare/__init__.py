"""From text files to token files: read, tokenize in several processes, write in order, continue after an end."""
