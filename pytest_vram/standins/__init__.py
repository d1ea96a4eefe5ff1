"""Stand-ins for what a program asks the Hugging Face hub for: models without weights, tokenizers, and the longest rows."""
