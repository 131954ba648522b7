"""nernlit: a trained CNN stored as a small coordinate network."""
