"""Train an adapter with transformers' Trainer (pip install transformers accelerate): its hooks make a loop's calls."""

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

import petune


class Squares(Dataset):
    """Squares that are darker or lighter: stands for your own images."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> dict:
        return {"pixel_values": torch.full((3, 32, 32), i / 16 - 1), "labels": i // 16}


class StepHooks(TrainerCallback):
    """Gives a method its steps: AdaLoRA prunes ranks, others have a schedule."""

    def __init__(self, att: petune.Attachment) -> None:
        self.att = att

    def on_train_begin(self, args, state, control, **_) -> None:
        self.att.on_train_start(state.max_steps)

    def on_optimizer_step(self, args, state, control, **_) -> None:  # while there are still gradients
        self.att.on_step_end(state.global_step)


class AdapterTrainer(Trainer):
    """A Trainer of what an attachment trains, with the method's own loss term."""

    def __init__(self, att: petune.Attachment, **options) -> None:
        super().__init__(model=att.model, callbacks=[StepHooks(att)], **options)
        self.att = att

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.AdamW(self.att.param_groups(), lr=self.args.learning_rate)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, **options):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        if model.training:
            loss = loss + self.att.loss(self.state.global_step)
        return (loss, outputs) if return_outputs else loss


if __name__ == "__main__":
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=2))
    att = petune.attach(model, "adaptformer", bottleneck=4)
    options = {"max_steps": 20, "learning_rate": att.recipe.lr, "lr_scheduler_type": "cosine", "report_to": "none"}
    arguments = TrainingArguments("trainer", save_strategy="no", use_cpu=True, disable_tqdm=True, **options)
    AdapterTrainer(att, args=arguments, train_dataset=Squares()).train()
    att.save("my-adapter")
    print(f"saved {att.counts.tuned} tuned parameters")
