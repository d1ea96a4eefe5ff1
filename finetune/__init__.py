"""finetune: trains LoRA and QLoRA adapters, with gradients that are exact under accumulation and checkpointing."""
