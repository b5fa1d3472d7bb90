"""Running a sampler: from seeds, in batches that requests join and leave, and with equal bits at any batch size."""
