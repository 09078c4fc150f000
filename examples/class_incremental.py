"""Learn ten digits two at a time with L2P, and forget little: the class-incremental protocol of its paper.

pip install petune-l2p
python examples/class_incremental.py
"""

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import petune

TASKS, STEPS, BATCH_SIZE = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)], 30, 32

data = load_digits()  # 1,797 images of 8x8
images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1).expand(-1, 3, -1, -1) / 8 - 1
labels = torch.tensor(data.target)
is_test = torch.arange(len(labels)) % 5 == 0

torch.manual_seed(0)
# Your own model goes here, with its pretrained weights. This small one learns mirrored digits in their place.
model = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=2, depth=2, embed_dim=48, num_classes=10)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(250):
    batch = torch.randint(len(labels), (64,))
    optimizer.zero_grad()
    cross_entropy(model(images[batch].flip(-1)), labels[batch]).backward()
    optimizer.step()
model.reset_classifier(10)
torch.nn.init.zeros_(model.head.weight)
att = petune.attach(model, "l2p", pool_size=10, top_k=3, length=2)


@torch.no_grad()
def accuracy(classes: tuple[int, ...]) -> float:
    """Return the top-1 accuracy on test images of some classes, among all ten: the task is not told."""
    rows = torch.nonzero(torch.isin(labels, torch.tensor(classes)) & is_test).flatten()
    return (model.eval()(images[rows]).argmax(1) == labels[rows]).float().mean().item()


after = []  # by the task that was learned last, the accuracy on each task so far
for number, classes in enumerate(TASKS):
    optimizer = torch.optim.AdamW(att.param_groups(), lr=1e-2)  # a new one for each task
    rows = torch.nonzero(torch.isin(labels, torch.tensor(classes)) & ~is_test).flatten()
    others = torch.tensor([c for c in range(10) if c not in classes])
    for step in range(STEPS):
        batch = rows[torch.randint(len(rows), (BATCH_SIZE,))]
        logits = model.train()(images[batch]).index_fill(1, others, float("-inf"))  # other classes stay as they are
        optimizer.zero_grad()
        (cross_entropy(logits, labels[batch]) + att.loss(step)).backward()
        optimizer.step()
    after.append([accuracy(seen) for seen in TASKS[: number + 1]])

last = after[-1]
forgetting = [max(row[i] for row in after[i:]) - last[i] for i in range(len(TASKS) - 1)]
print(f"average accuracy {sum(last) / len(last):.2f}, forgetting {sum(forgetting) / len(forgetting):.2f}")
