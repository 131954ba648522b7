"""Files: atomic writing, and validated reading that never runs code."""
