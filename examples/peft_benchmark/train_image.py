"""A training loop like that of PEFT's image benchmark: FLUX.2-klein-4B in bfloat16, 512 x 512 pixels, batch 2, AdamW.

Every size is fixed, so nothing here is guessed. Prompts and images are encoded beforehand there, and made up here.
Needs ``pip install diffusers``. Prints what torch holds after a step, as the benchmark logs it.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel
from peft import PeftConfig, get_peft_model
from transformers import Dinov2Config, Dinov2Model

ROWS, BATCH, STEPS = 14, 2, 12
CHANNELS, SIDE, TEXT, WIDTH = 128, 32, 512, 7680  # of the latents, in patches, in tokens, of the text encoder's output


def load(experiment):
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Flux2Transformer2DModel(
            num_layers=5,
            num_single_layers=20,
            num_attention_heads=24,
            joint_attention_dim=WIDTH,
            guidance_embeds=False,
        )
    torch.set_default_dtype(torch.float32)
    model.enable_gradient_checkpointing()
    if (experiment / "adapter_config.json").exists():
        model = get_peft_model(model, PeftConfig.from_pretrained(experiment))
    return model.train()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--experiment", type=Path, required=True, help="a folder of the benchmark's own")
    experiment = parser.parse_args().experiment
    training = experiment / "training_params.json"
    settings = json.loads(training.read_text()) if training.exists() else {}

    torch.manual_seed(0)
    torch.nn.Linear(1, 1).to("cuda")
    before = torch.cuda.memory_reserved()
    model = load(experiment).to("cpu")
    torch.cuda.empty_cache()
    judge = Dinov2Model(Dinov2Config(image_size=518, patch_size=14)).cuda().eval()  # waits on the card meanwhile
    values = {"lr": 1e-4, "weight_decay": 1e-4, **settings.get("optimizer_kwargs", {})}
    optimizer = torch.optim.AdamW(model.parameters(), **values)
    prompts = torch.zeros(ROWS, TEXT, WIDTH, device="cuda", dtype=torch.bfloat16)
    text_ids = torch.zeros(ROWS, TEXT, 4, device="cuda", dtype=torch.int64)
    images = torch.zeros(ROWS, CHANNELS, SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
    model.to("cuda")
    places = torch.cartesian_prod(*(torch.arange(n) for n in (1, SIDE, SIDE, 1))).expand(BATCH, -1, -1)
    for step in range(1, STEPS + 1):
        rows = torch.arange(BATCH * step, BATCH * (step + 1), device="cuda") % ROWS
        latents, prompt, ids = (cache.index_select(0, rows) for cache in (images, prompts, text_ids))
        noise = torch.randn_like(latents)
        noisy = 0.5 * latents + 0.5 * noise
        optimizer.zero_grad()
        predicted = model(
            hidden_states=noisy.flatten(2).transpose(1, 2),
            timestep=torch.full((BATCH,), 0.5, device="cuda"),
            guidance=None,
            encoder_hidden_states=prompt,
            txt_ids=ids,
            img_ids=places.to("cuda"),
            return_dict=False,
        )[0]
        predicted = predicted[:, : SIDE * SIDE].transpose(1, 2).reshape(latents.shape)
        loss = (predicted.float() - (noise - latents).float()).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if hasattr(getattr(model, "base_model", None), "update_and_allocate"):
            model.base_model.update_and_allocate(step)
        loss = loss.detach()
    allocated, reserved = torch.cuda.memory_allocated() - before, torch.cuda.memory_reserved() - before
    print(json.dumps({"allocated": allocated, "reserved": reserved}))
    del judge


if __name__ == "__main__":
    main()
