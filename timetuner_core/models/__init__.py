"""What `timetuner_core.models.loading` consists of: reading a model folder's files, networks, schedulers and data."""
