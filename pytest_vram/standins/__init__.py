"""Stand-ins for what a program asks the Hugging Face hub for: models without weights, tokenizers, the longest rows."""
