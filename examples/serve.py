"""Serve many adapters on one backbone with LitServe (pip install litserve): each request names its adapter.

python examples/serve.py adapters/    # every folder in it is an adapter directory, such as runs/pets/adapter

POST /predict {"adapter": "pets", "image": "<JPEG or PNG in base64>"}    {"adapter": null, ...} is the backbone alone
POST /predict {"load": "adapters/birds"} or {"remove": "birds"}          while the others are being served
"""

import argparse
import base64
import io
from pathlib import Path

import litserve
import timm
import torch
from PIL import Image

import petune


class AdapterAPI(litserve.LitAPI):
    def __init__(self, folder: str, backbone: str, pretrained: bool = True, max_memory: int | None = None) -> None:
        super().__init__(max_batch_size=16, batch_timeout=0.02)
        self.folder, self.backbone, self.pretrained, self.max_memory = folder, backbone, pretrained, max_memory

    def setup(self, device: str) -> None:
        torch.manual_seed(0)
        model = timm.create_model(self.backbone, pretrained=self.pretrained).to(device)
        self.transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        self.bank = petune.AdapterBank(model, max_memory=self.max_memory)
        for config in sorted(Path(self.folder).glob("*/adapter_config.json")):
            self.bank.load(config.parent.name, config.parent)

    def predict(self, requests: list[dict]) -> list[dict]:
        answers = [self.alone(self.change, request) for request in requests]
        images = {i: self.alone(self.image, requests[i]) for i, answer in enumerate(answers) if answer is None}
        answers = [images.get(i, answer) for i, answer in enumerate(answers)]
        asked = [i for i, answer in enumerate(answers) if isinstance(answer, torch.Tensor)]
        rows = self.rows([answers[i] for i in asked], [requests[i].get("adapter") for i in asked])
        for i, row in zip(asked, rows, strict=True):
            is_row = isinstance(row, torch.Tensor)
            answers[i] = {"class": int(row.argmax()), "logits": row.tolist()} if is_row else row
        return answers

    def alone(self, function, *args):
        """Call a function for one request: if it fails, this request gets the error, and the others their answers."""
        try:
            return function(*args)
        except Exception as error:
            return {"error": str(error) or type(error).__name__}

    def change(self, request: dict) -> dict | None:
        """Load or remove an adapter; return None for requests with an image."""
        if "load" in request:
            self.bank.load(Path(request["load"]).name, request["load"])
        elif "remove" in request:
            self.bank.remove(request["remove"])
        else:
            return None
        return {"adapters": [*self.bank.adapters]}

    def image(self, request: dict) -> torch.Tensor:
        """Decode a request's image, once all changes of the batch are done."""
        if "image" not in request or request.get("adapter") not in [None, *self.bank.adapters]:
            raise ValueError(f"no such adapter, or no image. Adapters: {', '.join(self.bank.adapters)}")
        return self.pixels(request["image"])

    def rows(self, images: list[torch.Tensor], names: list[str | None]) -> list:
        """Compute logits in one batch; if that fails, each image alone, so that only those that fail get an error."""
        if not images:
            return []
        with torch.inference_mode():
            rows = self.alone(self.logits, torch.stack(images), names)
        if isinstance(rows, dict) and len(images) > 1:
            return [row for image, name in zip(images, names, strict=True) for row in self.rows([image], [name])]
        return [rows] if isinstance(rows, dict) else rows

    def logits(self, images: torch.Tensor, names: list[str | None]) -> list[torch.Tensor]:
        return self.bank(images.to(next(self.bank.model.parameters()).device), names)

    def pixels(self, text: str) -> torch.Tensor:
        return self.transform(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", help="folder of adapter directories")
    parser.add_argument("--backbone", default="vit_small_patch16_224", help="the timm model that they belong to")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    litserve.LitServer(AdapterAPI(args.folder, args.backbone)).run(host="127.0.0.1", port=args.port)
