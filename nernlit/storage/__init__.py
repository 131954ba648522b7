"""Files: whole or not at all when written, checked and without code when read."""
