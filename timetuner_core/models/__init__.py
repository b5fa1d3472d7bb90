"""What `timetuner_core.loading` consists of: reading a model folder's files, networks, schedulers and data."""
