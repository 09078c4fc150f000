"""Train AdaptFormer in a plain PyTorch loop on scikit-learn's digits, then save and reload the adapter.

python examples/own_loop.py
"""

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import petune

STEPS, BATCH_SIZE = 60, 64

data = load_digits()  # 1,797 images of 8x8
images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1).expand(-1, 3, -1, -1) / 8 - 1
labels = torch.tensor(data.target)

torch.manual_seed(0)
# Your own model goes here, with its pretrained weights. This small one is random, so it does not learn much.
model = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=2, depth=2, num_classes=10)
att = petune.attach(model, "adaptformer", bottleneck=16)
print(att)

optimizer = torch.optim.AdamW(att.param_groups(), lr=att.recipe.lr)
att.on_train_start(STEPS)
model.train()
for step in range(STEPS):
    rows = torch.randint(len(images), (BATCH_SIZE,))
    loss = cross_entropy(model(images[rows]), labels[rows]) + att.loss(step)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    att.on_step_end(step)
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

model.eval()
att.save("digits-adapter")
with torch.no_grad():
    tuned = model(images[:8])
    att.detach()  # the model is as it was before attach
    petune.load(model, "digits-adapter")
    assert torch.equal(model(images[:8]), tuned)
print("saved to digits-adapter, loaded again: the same logits")
