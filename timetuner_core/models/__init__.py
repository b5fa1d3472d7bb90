"""Models: reading a folder's files, networks, schedulers and data, and the built-in mixtures."""
