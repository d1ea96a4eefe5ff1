# LitGPT trains on a checkpoint in a format of its own, so the model is converted first.
set -e
litgpt convert_to_litgpt ./checkpoints/meta-llama/Llama-3.2-1B
litgpt finetune_lora --config lora.yaml
