"""State outside its device: pages that are brought in for a step and written back."""
