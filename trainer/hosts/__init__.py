"""What the hosts of a run say to each other, and what they notice of each other."""
