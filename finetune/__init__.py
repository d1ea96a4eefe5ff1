"""A small, exact QLoRA fine-tuner."""
