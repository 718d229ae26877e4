"""What fine-tuning trains on."""
