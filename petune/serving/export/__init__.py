"""A trained model without petune: as a torch.export program, as ONNX, or as the backbone's own weights."""

from petune.serving.export.write import FORMATS, Exported, Format, export

__all__ = ["FORMATS", "Exported", "Format", "export"]
