"""Who holds which layers: the model's skeleton, the partition and the plan."""
