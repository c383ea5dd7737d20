"""What is measured on held-out data: accuracy, per-class accuracy, attack success rate."""
