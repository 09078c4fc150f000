"""Serve three tasks with one backbone, by name or mixed in one batch.

python examples/many_adapters.py
"""

import timm
import torch

import petune

torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=2, num_classes=10).eval()

# Three adapters, as three runs on the same backbone would leave them in their directories.
for task, method in (("pets", "adaptformer"), ("cars", "lora"), ("birds", "vpt:num_prompts=4")):
    att = petune.attach(model, method)
    for parameter in att.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    att.save(f"adapters/{task}")
    att.detach()

bank = petune.AdapterBank(model)
for task in ("pets", "cars", "birds"):
    bank.load(task, f"adapters/{task}")

images = torch.randn(4, 3, 32, 32)
with torch.no_grad():
    bank.use("pets")  # one task for all images
    pets = model(images)

    mixed = bank(images, ["pets", "cars", "birds", None])  # one task for each image; None is the backbone alone
torch.testing.assert_close(mixed[0], pets[0])
for task, logits in zip(("pets", "cars", "birds", "backbone alone"), mixed, strict=True):
    print(f"{task}: class {logits.argmax().item()}")
